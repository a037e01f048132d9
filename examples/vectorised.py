"""Several episodes at once: stable-baselines3's TD3 on worker processes, each with an environment of its own."""

import argparse

import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import SubprocVecEnv


def main(episodes, images, processes):
    arguments = {"budget": 0.01, "images": images, "calibration_images": images}
    envs = make_vec_env("arq_env:ARQ-ResNet20-Signs-v0", processes, seed=0, env_kwargs=arguments, vec_env_cls=SubprocVecEnv)
    (horizon,) = set(envs.get_attr("horizon"))
    # an episode of each environment, then as many gradient steps; the reward itself as return
    every = {"train_freq": horizon, "gradient_steps": -1, "learning_starts": horizon * min(20, episodes // 2)}
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.full(2, 0.3)), processes)
    agent = TD3("MlpPolicy", envs, gamma=1.0, n_steps=horizon, action_noise=noise, stats_window_size=episodes, seed=0, **every)
    agent.learn(episodes * horizon)
    rewards = [episode["r"] for episode in agent.ep_info_buffer]
    print(f"{len(rewards)} episodes on {envs.num_envs} processes, best reward {max(rewards):.3f}")
    envs.close()


if __name__ == "__main__":  # worker processes import the script
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--images", type=int, default=200, help="reward images of an episode: fewer are faster, the reward noisier")
    parser.add_argument("--processes", type=int, default=2)
    main(**vars(parser.parse_args()))
