"""A reward of one's own: certified radius minus a price for size, as a Gymnasium wrapper, and TD3 that trains on it."""

import argparse

import gymnasium as gym
import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise


class PricedSize(gym.Wrapper):
    """Takes ``price`` off the last reward for each tenth of FP32's size that the map's weights have.

    The wrapped environment holds maps within its budget of bit operations; among those this prefers small ones.
    """

    def __init__(self, env, price=1.0):
        super().__init__(env)
        self.price, self.weights = price, {layer.name: layer.parameters for layer in env.unwrapped.layers}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            bits = sum(self.weights[name] * weight_bits for name, (weight_bits, _) in info["bit_widths"].items())
            info["size"] = bits / (32 * sum(self.weights.values()))
            reward -= self.price * 10 * info["size"]
        return observation, reward, terminated, truncated, info


def main(episodes, images):
    env = PricedSize(gym.make("arq_env:ARQ-ResNet20-Signs-v0", budget=0.01, images=images, calibration_images=images))
    horizon = env.unwrapped.horizon
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.3))
    # the reward itself as return: it comes at the end of an episode
    agent = TD3("MlpPolicy", env, gamma=1.0, n_steps=horizon, action_noise=noise, learning_starts=min(20, episodes // 2) * horizon)
    agent.learn(episodes * horizon)

    observation, _ = env.reset(seed=0)
    terminated = False
    while not terminated:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, terminated, _, info = env.step(action)
    print(f"ACR {info['acr']:.4f} at {info['size']:.1%} of FP32's size, reward {reward:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--images", type=int, default=200, help="reward images of an episode: fewer are faster, the reward noisier")
    main(**vars(parser.parse_args()))
