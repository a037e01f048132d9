"""Networks and checkpoints of one's own, from gym.make to the files that say what a run was made from."""

import json
import shutil
import sys

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn

from arq_agents.run_folder import export_map
from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.datasets import Dataset, Split
from arq_env.networks.own import load_own, normalized, read_state
from arq_env.problem import Problem, load_mapped, load_problem
from arq_env.rewards import settings_for
from arq_env.support.batches import batch_size
from tests.own import Separable, arguments_of, make_net, trained_state

NAME, NET = "ARQ-Custom-v0", "tests.own:make_net"
MEAN, STD = [0.4], [0.3]


def custom(**changes):
    """An environment of the small network."""
    return gymnasium.make(NAME, **arguments_of(NAME) | changes)


def play(env, action=(0.3, -0.2)):
    env.reset(seed=0)
    done = False
    while not done:
        _, reward, done, _, info = env.step(np.float32(action))
    return reward, info


def saved(state, path):
    torch.save(state, path)
    return str(path)


def test_a_network_of_one_s_own_is_an_environment():
    env = custom()
    check_env(env.unwrapped)
    reward, info = play(env)
    assert env.unwrapped.horizon == 3 and info["reference_acr"] > 0.1 and info["bops_fraction"] <= 0.1
    assert play(custom())[0] == reward
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert play(again)[0] == reward
    assert env.unwrapped.evaluator.settings.images == 12 and custom(images=3).unwrapped.evaluator.settings.images == 3


def test_images_of_the_reward_follow_from_what_is_there():
    arguments = {name: value for name, value in arguments_of(NAME).items() if name != "images"}
    assert gymnasium.make(NAME, **arguments).unwrapped.evaluator.settings.images == 12
    assert gymnasium.make(NAME, reward_images=31, **arguments).unwrapped.evaluator.settings.images == 31


def test_large_images_are_taken_in_smaller_numbers():
    def settings(edge, rewarded, **changes):
        parts = (Split(np.broadcast_to(np.uint8(i), (n, edge, edge, 3)), np.zeros(n)) for i, n in enumerate((2, rewarded, 2)))
        data = Dataset("flat", ("a", "b"), True, *parts)
        found = settings_for(Problem(make_net().eval(), lambda: data, 0.5), **changes)
        return found.images, found.calibration_images

    assert settings(32, 2_000) == (2_000, 320) and settings(32, 50) == (50, 320)
    assert settings(224, 450) == (445, 111) and settings(224, 9, images=3, calibration_images=5) == (3, 5)
    assert [batch_size(3 * edge * edge, 128) for edge in (32, 104, 224, 2_000)] == [128, 128, 27, 1]


@pytest.mark.slow
def test_vector_environments_of_processes():
    env = make_vec_env(f"arq_env:{NAME}", 2, env_kwargs=arguments_of(NAME), vec_env_cls=SubprocVecEnv)
    env.reset()
    for _ in range(3):
        _, rewards, dones, infos = env.step(np.full((2, 2), (0.3, -0.2), np.float32))
    env.close()
    assert dones.all() and rewards.tolist() == pytest.approx([play(custom())[0]] * 2, abs=1e-6)


def front(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


STORED = {"0.mean": torch.tensor(MEAN).view(1, 1, 1), "0.std": torch.tensor(STD).view(1, 1, 1)}


@pytest.mark.parametrize(
    "layout, normalize",
    [
        (lambda s: s, None),
        (lambda s: {"arch": "separable", "epoch": 90, "state_dict": s, "optimizer": {"state": {}, "lr": 0.1}}, None),
        (lambda s: {"model": s, "step": torch.tensor(3)}, None),
        (lambda s: {"state_dict": s, "ema": s}, None),
        (lambda s: front(s, "module."), None),
        (lambda s: {"state_dict": front(s, "_orig_mod.module.")}, None),
        (lambda s: {name: tensor for name, tensor in s.items() if "num_batches" not in name}, None),
        (lambda s: {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in s.items()}, None),
        (lambda s: {"arch": "separable", "epoch": 90, "state_dict": front(s, "1.")}, [MEAN, STD]),
        (lambda s: {"state_dict": front(s, "1.module.")}, [MEAN, STD]),
        (lambda s: {"state_dict": STORED | front(s, "1.")}, [MEAN, STD]),
        (lambda s: {"state_dict": front(STORED | front(s, "1."), "module.")}, [MEAN, STD]),
        (lambda s: {"0.means": STORED["0.mean"], "0.sds": STORED["0.std"]} | front(s, "1.module."), [MEAN, STD]),
    ],
)
def test_layouts_of_published_checkpoints(layout, normalize, tmp_path):
    state = trained_state()
    path = saved(layout(state), tmp_path / "net.pth")
    network, digest = load_own(NET, checkpoint=path, normalize=normalize)
    bare = make_net()
    bare.load_state_dict(state)
    expected = (bare if normalize is None else normalized(bare, normalize)).eval()
    images = torch.rand(5, 1, 12, 12)
    torch.testing.assert_close(network(images), expected(images), rtol=0.01, atol=0.01)
    assert not network.training and len(digest) == 64
    if normalize is not None and any(name.endswith(("0.mean", "0.means")) for name in read_state(path)[0]):
        assert torch.equal(load_own(NET, checkpoint=path)[0](images), network(images))  # the file has it


def test_normalization_is_put_before_the_noise_is_not():
    network = normalized(nn.Flatten(), [[0.5, 0.25], [0.5, 0.125]])
    assert network(torch.tensor([[[[1.0]], [[0.5]]]])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (lambda s: front(s, "1."), {}, "layer in front that holds no weights.*give normalize"),
        (lambda s: STORED | front(s, "1."), {"normalize": [[0.1], [0.3]]}, "holds another normalisation"),
        (lambda s: s | {"extra.weight": torch.ones(2)}, {}, "network does not have is 'extra.weight'"),
        (
            lambda s: {name.replace("grouped", "dense"): tensor for name, tensor in s.items()},
            {},
            "first missing is 'grouped.weight', the first that the network does not have is 'dense.weight'",
        ),
        (lambda s: {}, {}, "holds no one set of weights .there is none."),
        (lambda s: {"a": s, "b": s}, {}, "there are a, b"),
        (lambda s: [1, 2], {}, "holds no one set of weights"),
        (lambda s: s | {"head.bias": torch.full((3,), torch.nan)}, {}, "head.bias holds NaN"),
        (lambda s: make_net(), {}, "cannot be read as weights .it holds more than weights"),
        (lambda s: s, {"arguments": {"width": 16}}, r"'stem.weight' is \[8, 1, 3, 3\] there and \[16, 1, 3, 3\] here"),
        (lambda s: s, {"arguments": {"depth": 16}}, "cannot be called with .*depth"),
        (lambda s: s, {"normalize": [[0.1]]}, "two lists"),
        (lambda s: s, {"normalize": [[0.1], [0.0]]}, "one positive standard deviation"),
        (lambda s: s, {"normalize": "ab"}, "two lists"),
    ],
)
def test_checkpoints_that_do_not_fit(spoil, options, message, tmp_path):
    path = saved(spoil(trained_state()), tmp_path / "net.pth")
    with pytest.raises(ArqError, match=message):
        load_own(NET, checkpoint=path, **options)


def test_files_that_are_no_checkpoints(tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in trained_state().items()}, tmp_path / "net.safetensors")
    assert load_own(NET, checkpoint=str(tmp_path / "net.safetensors"))[1] == read_state(str(tmp_path / "net.safetensors"))[1]
    whole = (tmp_path / "net.safetensors").read_bytes()
    for name, content in (("cut.safetensors", whole[:-9]), ("other.pth", b"no weights"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArqError, match=f"{name} cannot be read as weights"):
            load_own(NET, checkpoint=str(tmp_path / name))
    with pytest.raises(ArqError, match="No such file"):
        load_own(NET, checkpoint=str(tmp_path / "none.pth"))


def test_loading_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load_own(NET, checkpoint=arguments_of(NAME)["checkpoint"])
    assert torch.equal(torch.rand(1), expected)


def test_without_a_checkpoint_the_function_must_return_trained_weights(tmp_path, monkeypatch):
    with pytest.raises(ArqError, match="drawn at random: give the checkpoint"):
        load_own(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.save(trained_state(), "net.pth")
    (tmp_path / "mytrained.py").write_text(
        "import torch\nfrom tests.own import make_net as bare\ndef make_net():\n    network = bare()\n"
        "    network.load_state_dict(torch.load('net.pth', weights_only=True))\n    return network\ndef nothing(): pass\n"
    )
    arguments = {key: value for key, value in arguments_of(NAME).items() if key != "checkpoint"} | {"network": "mytrained:make_net"}
    reward, _ = play(gymnasium.make(NAME, **arguments))
    assert reward == play(custom())[0]
    with pytest.raises(ArqError, match="gave 'NoneType'"):
        load_own("mytrained:nothing")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": None}, "network is None"),
        ({"data": None}, "data is None"),
        ({"network": "tests.own:nothing"}, "no function 'nothing'"),
        ({"network": "vgg"}, "no network 'vgg'"),
        ({"network": "resnet20"}, "holds the weights of another network"),
        ({"checkpoint": 3}, "checkpoint is 3"),
        ({"keep": 3}, "keep is 3"),
        ({"keep": ["nothing"]}, "keep names 'nothing'"),
        ({"network_arguments": [1]}, "network_arguments is"),
        ({"network_arguments": {"width": {1}}}, "plain data"),
        ({"data": "tests.own:small_data"}, "cannot be run on an image"),
        ({"data": "nowhere/"}, "no data set 'nowhere/'"),
        ({"image_size": 8.0}, "image_size is 8.0"),
        ({"flip": 1}, "flip is 1"),
        ({"images": 400}, "400 reward images"),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, message):
    with pytest.raises(ArqError, match=message):
        play(custom(**changes))


def test_options_of_own_networks_are_not_for_shipped_ones():
    for options in ({"normalize": [MEAN, STD]}, {"flip": True}, {"keep": ["fc"]}):
        with pytest.raises(ArqError, match=f"{next(iter(options))} is for networks of your own"):
            load_problem("resnet20", "cifar10", **options)


def test_as_many_logits_as_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.own.CLASSES", ("a", "b", "c", "d"))
    path = saved(make_net().state_dict(), tmp_path / "net.pth")
    with pytest.raises(ArqError, match="the network has 4 classes and the data have 3"):
        custom(checkpoint=path)


def test_a_shipped_architecture_with_weights_of_one_s_own(tmp_path):
    problem = load_problem("resnet20", "signs", sigma=0.5)
    path = saved(problem.network.state_dict(), tmp_path / "mine.pth")
    mine = load_problem("resnet20", "signs", sigma=0.5, checkpoint=path)
    assert mine.digest != problem.digest and mine.layers == problem.layers  # the digests of their files differ
    assert mine.origin["problem"]["checkpoint"] == path and "problem" not in problem.origin


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A map of the small network, whose data and weights lie in the folder that it was made from."""
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(NAME)
    (tmp_path / "photos").symlink_to(arguments["data"])
    shutil.copy(arguments["checkpoint"], "net.pth")
    env = custom(data="photos", checkpoint="net.pth").unwrapped
    export_map(tmp_path / "run", env, uniform(env.layers, 3, 5), 0.1, {})
    return tmp_path / "run", env.problem


def test_a_run_folder_says_what_it_was_made_from(run):
    folder, made_with = run
    problem, bit_widths, document, _ = load_mapped(folder)
    assert bit_widths == uniform(problem.layers, 3, 5) and problem.sigma == 0.25
    assert problem.digest == made_with.digest and problem.data_digest == made_with.data_digest
    said = document["provenance"]["problem"]
    assert said["network"] == NET and said["data"] == "photos" and said["checkpoint"] == "net.pth"
    assert said["digests"]["images"] == {"train": 108, "reward": 12, "test": 12}
    assert document["network"] == NET and document["dataset"] == "photos"


def test_what_is_missing_or_different_is_said(run, tmp_path, monkeypatch):
    folder, _ = run
    (image,) = (tmp_path / "photos" / "test" / "disc").glob("0000.png")
    before = image.read_bytes()
    image.write_bytes((tmp_path / "photos" / "test" / "bars" / "0000.png").read_bytes()[:-1] + b"x")
    try:
        with pytest.raises(ArqError, match="found on other data than photos is here"):
            load_mapped(folder)
    finally:
        image.write_bytes(before)
    problem = json.loads((folder / "bit_widths.json").read_text())
    for change, message in (
        ({"checkpoint": "moved.pth"}, "what .* was made for is not here: moved.pth cannot be read"),
        ({"data": "moved"}, "is not here: there is no data set 'moved'"),
        ({"network": "moved:make_net"}, "is not here: the module moved cannot be imported"),
        ({"depth": 3}, "what is not understood"),
    ):
        changed = problem | {"provenance": problem["provenance"] | {"problem": problem["provenance"]["problem"] | change}}
        (folder / "bit_widths.json").write_text(json.dumps(changed))
        with pytest.raises(ArqError, match=message):
            load_mapped(folder)
    (folder / "bit_widths.json").write_text(json.dumps(problem))
    state = trained_state()
    torch.save(state | {"head.bias": state["head.bias"] + 1}, "net.pth")
    with pytest.raises(ArqError, match="found for other weights"):
        load_mapped(folder)
    torch.save(state, "net.pth")


def test_another_forward_of_the_same_weights_is_warned_of(run, monkeypatch):
    folder, _ = run
    before = Separable.forward
    monkeypatch.setattr(Separable, "forward", lambda self, images: 2 * before(self, images))
    with pytest.warns(UserWarning, match="computes otherwise"):
        load_mapped(folder)
