"""One network for every map: trained, kept, quantized by any map, searched, finished."""

import pickle

import numpy as np
import pytest
import torch

import arq_env.networks.training as training
from arq_agents.any_bits import drawn_maps, train_any_bits
from arq_agents.search import search
from arq_env import ArqError
from arq_env.bitwidths import Bits, uniform
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.finishing import brief_recipe, finish_briefly
from arq_env.networks.checkpoints import SHIPPED
from arq_env.networks.recipe import finetuning_recipe
from arq_env.quantization.any_bits import AnyBitsQuantizer, ManyMaps, choose, load_any_bits, save_any_bits, start_any_bits
from arq_env.quantization.modules import QuantizedLayer
from tests.toy import make_toy_env, toy_dataset, toy_problem

RECIPE = finetuning_recipe(0.5, epochs=2, batch=50, peak_rate=0.01)
BUDGETS = (0.03, 0.06)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any-bits")
    network, records = train_any_bits(make_toy_env(), RECIPE, folder, budgets=BUDGETS, maps=1)
    return network, records, saved(network, folder / "weights.safetensors")


def saved(network, path, **card):
    save_any_bits(network, path, {"base": toy_problem().base_digest, "checkpoint": "0" * 64, "sigma": 0.5, "network": "toy"} | card)
    return path


@pytest.fixture(scope="module")
def problem(trained):
    return toy_problem(any_bits=trained[2])


def test_it_starts_as_the_calibrated_network():
    evaluator = Evaluator(toy_problem())
    quantizer, layers = evaluator.quantizer, evaluator.problem.layers
    images = evaluator.problem.reward_images(20)[0]
    started = AnyBitsQuantizer(quantizer.network, layers, quantizer.images, start_any_bits(quantizer))
    for bit_widths in (
        uniform(layers, 2, 3),
        {layer.name: Bits(8 if i in (0, 3) else 5 - i, 8 if i in (0, 3) else 2 + i) for i, layer in enumerate(layers)},
    ):
        a, b = (q.quantize(bit_widths) for q in (quantizer, started))
        steps = [[module.weight_step for module in n.modules() if isinstance(module, QuantizedLayer)] for n in (a, b)]
        assert len(steps[0]) == 4
        torch.testing.assert_close(*steps)  # once through a logarithm
        torch.testing.assert_close(a(images), b(images), rtol=0, atol=0.2)
        assert (a(images).argmax(1) == b(images).argmax(1)).float().mean() > 0.9


def test_gradients_are_those_of_the_maps_drawn_and_reach_their_steps_alone():
    evaluator = Evaluator(toy_problem())
    layers, images = evaluator.problem.layers, torch.rand(6, 3, 8, 8)
    maps = [uniform(layers, 2, 2), uniform(layers, 4, 3)]
    many = ManyMaps(start_any_bits(evaluator.quantizer), lambda rng: maps).train()
    logits = many(images)
    assert logits.shape == (12, 3) and many.passes == 1
    again = many.network
    for i, bit_widths in enumerate(maps):
        choose(again, bit_widths)
        torch.testing.assert_close(logits[6 * i : 6 * i + 6], again(images))
    logits.square().sum().backward()
    middle = again.middle
    assert {bits for bits, step in middle.weight_log_steps.items() if step.grad is not None} == {"2", "4"}
    assert {bits for bits, step in middle.activation_log_steps.items() if step.grad is not None} == {"2", "3"}
    assert [*again.first.weight_log_steps] == ["8"] and middle.weight.grad.abs().sum() > 0


def test_maps_are_drawn_from_the_range_that_is_searched():
    env = make_toy_env(0.06)
    draw = drawn_maps(env, BUDGETS, 20)
    least, most, *drawn = draw(np.random.default_rng(0))
    assert least == uniform(env.layers, 2, 2) and most == uniform(env.layers, 8, 8)
    costs = [env.default_budget.amount(bit_widths) for bit_widths in drawn]
    assert max(costs) <= BUDGETS[1] and min(costs) < 0.04 and len({str(one) for one in drawn}) > 8
    assert draw(np.random.default_rng(0)) == [least, most, *drawn]
    with pytest.raises(ArqError, match="low first"):
        drawn_maps(env, (0.06, 0.03), 1)
    with pytest.raises(ArqError, match="budget"):
        drawn_maps(env, (1e-6, 0.03), 1)


def test_a_killed_training_ends_the_same(trained, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def die(*args):
        raise Killed

    def train(**more):
        return train_any_bits(make_toy_env(), RECIPE, tmp_path, budgets=BUDGETS, maps=1, **more)

    batches = []
    with pytest.raises(Killed):
        train(on_batch=lambda count: (batches.append(count), die() if len(batches) > 40 else None))
    network, records = train()
    assert [record["epoch"] for record in records] == [1, 2] and "held_out_accuracy" not in records[0]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, trained[0].state_dict()[name]), name
    with pytest.raises(ArqError, match="budgets"):
        train_any_bits(make_toy_env(), RECIPE, tmp_path, budgets=(0.03, 0.07), maps=1)


def test_it_learns_few_bits(trained, problem):
    plain, learned = make_toy_env().evaluator, make_toy_env(problem=problem).evaluator
    few = uniform(problem.layers, 2, 2)
    assert learned.evaluate(few).acr > plain.evaluate(few).acr
    kept = trained[1][-1]
    assert kept["acr_W2A2"] == pytest.approx(learned.evaluate(few).acr / learned.reference.acr)
    assert kept["acr_W8A8"] > 0.9 and learned.reference.acr == plain.reference.acr
    assert learned.rounding == "exact"


def test_a_file_is_what_was_trained(trained, problem, tmp_path):
    network, _, path = trained
    loaded, card = load_any_bits(path, problem.network, problem.layers)
    assert card["network"] == "toy"
    bit_widths = {layer.name: bits for layer, bits in zip(problem.layers, [(8, 8), (2, 5), (3, 3), (8, 8)], strict=True)}
    bit_widths = {name: Bits(*bits) for name, bits in bit_widths.items()}
    images = torch.rand(5, 3, 8, 8)
    for any_bits in (network, loaded):
        choose(any_bits, bit_widths)
    assert torch.equal(network(images), loaded(images))
    other = toy_problem(fix={"first": "4/4"}, any_bits=path)
    with pytest.raises(ArqError, match="layer 'first' has any-bits weights for 8 weight bits, and the map gives it 4"):
        Evaluator(other).quantizer.quantize(uniform(other.layers, 3, 3))
    with pytest.raises(ArqError, match="from another network"):
        _ = toy_problem(any_bits=path, card={"network": "toy", "dataset": "toy", "digest": "1" * 64}).digest
    with pytest.raises(ArqError, match="under noise of sigma 0.5, and here it is 0.25"):
        _ = toy_problem(any_bits=path, sigma=0.25).digest
    other = saved(network, tmp_path / "other.safetensors", base="f" * 64)
    with pytest.warns(UserWarning, match="computed otherwise"):
        _ = toy_problem(any_bits=other).digest
    with pytest.raises(ArqError, match="from another network"):
        _ = toy_problem(any_bits=saved(network, other, base="f" * 64, checkpoint=None)).digest
    with pytest.raises(ArqError, match="holds no any-bits weights"):
        load_any_bits(SHIPPED / "resnet20-signs-sigma0.5-gaussian.safetensors", problem.network, problem.layers)
    with pytest.raises(ArqError, match="train_any_bits.py"):
        load_any_bits(tmp_path / "nothing.safetensors", problem.network, problem.layers)


def test_a_search_and_what_comes_after_it(problem, tmp_path):
    env = make_toy_env(problem=problem)
    best = search("integer_program", env, episodes=3, folder=tmp_path / "run", seed=0, progress=False)
    assert env.evaluator.evaluate(best.bit_widths).acr > 0
    assert problem.digest != toy_problem().digest and problem.origin["weights"] == str(problem.any_bits)
    network = finish_briefly(env.evaluator, best.bit_widths, 5)
    assert brief_recipe(problem, 5).start != brief_recipe(toy_problem(), 5).start  # so not "finished alike"
    assert [module.weight_bits for module in network.modules() if isinstance(module, QuantizedLayer)] == [
        bits.weight for bits in best.bit_widths.values()
    ]
    with pytest.raises(ArqError, match="leave regained_bits at 0"):
        Evaluator(problem, CertifierSettings(images=64, regained_bits=1))
    with pytest.raises(ArqError, match="noises=1"):
        train_any_bits(make_toy_env(), finetuning_recipe(0.5, noises=2), tmp_path / "noises", budgets=BUDGETS)
    with pytest.raises(ArqError, match="stand any map already"):
        train_any_bits(env, RECIPE, tmp_path / "again", budgets=BUDGETS)


@pytest.mark.parametrize(
    "fix, bits", [({"first": "8/4", "last": "8/8"}, None), ({"first": "4/4", "last": "4/4"}, [2, 3, 4]), (None, [2, 4, 8])]
)
def test_any_choice_of_bits(fix, bits, tmp_path):
    few = finetuning_recipe(0.5, epochs=1, batch=50, images=100)
    network, records = train_any_bits(make_toy_env(fix=fix, bits=bits), few, tmp_path, budgets=BUDGETS, maps=1)
    judged = [b for b in (2, 3, 4, 8) if bits is None or b in bits]
    assert [name for name in records[0] if name.startswith("acr_")] == [f"acr_W{b}A{b}" for b in judged]
    chosen = toy_problem(fix=fix, bits=bits, any_bits=saved(network, tmp_path / "weights.safetensors"))
    env = make_toy_env(0.06, problem=chosen)
    best = search("integer_program", env, episodes=2, folder=tmp_path / "run", seed=0, progress=False)
    for quantized in (env.evaluator.quantizer.quantize(best.bit_widths), finish_briefly(env.evaluator, best.bit_widths, 2)):
        layers = [module for module in quantized.modules() if isinstance(module, QuantizedLayer)]
        assert [(layer.weight_bits, layer.activation_bits) for layer in layers] == [*best.bit_widths.values()]


def test_workers_have_the_weights_that_were_read(trained, tmp_path):
    path = saved(trained[0], tmp_path / "weights.safetensors")
    evaluator = make_toy_env(problem=toy_problem(any_bits=path)).evaluator
    few = uniform(evaluator.problem.layers, 2, 2)
    acr = evaluator.evaluate(few).acr
    saved(start_any_bits(Evaluator(toy_problem()).quantizer), path)
    worker = pickle.loads(pickle.dumps(evaluator))
    worker._known.clear()
    assert worker.evaluate(few).acr == acr and worker.problem.digest == evaluator.problem.digest
    assert toy_problem(any_bits=path).digest != evaluator.problem.digest


def test_labels_and_teacher_count_for_every_map(tmp_path, monkeypatch):
    seen = []
    loss = training.smoothing_loss
    monkeypatch.setattr(
        training,
        "smoothing_loss",
        lambda logits, labels, **k: seen.append((logits, labels, k["teacher_logits"])) or loss(logits, labels, **k),
    )
    train_any_bits(make_toy_env(), finetuning_recipe(0.5, epochs=1, batch=50, images=50), tmp_path, budgets=BUDGETS, maps=1)
    ((logits, labels, taught),) = seen
    assert logits.shape == taught.shape == (150, 3) and torch.equal(labels[:50], labels[100:])
    assert torch.equal(taught[:50], taught[50:100]) and len(toy_dataset().train.labels) >= 50
