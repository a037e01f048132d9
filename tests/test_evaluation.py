import copy
import dataclasses
import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch

from arq_env import ArqError
from arq_env.bitwidths import Bits, complete, uniform
from arq_env.comparison import FP32, TestSettings, compare_maps, paired_difference
from arq_env.evaluation import CertifierSettings, Evaluator, warn_if_noise_is_new
from arq_env.report.tables import comparison_table, layer_table
from arq_env.rewards import REWARDS, Figures, Reward
from tests.toy import ToyNet, toy_dataset, toy_problem

SMALL = CertifierSettings(images=16, n0=4, n=16)


def test_each_number_comes_from_its_own_split(problem):
    """The search's images and the test images are never mixed up, nor calibrated on."""
    data = toy_dataset()
    reward, _ = problem.reward_images(64)
    test, _ = problem.test_images(every=2)
    torch.testing.assert_close(reward[3], torch.as_tensor(data.reward.images[3]).permute(2, 0, 1) / 255)
    torch.testing.assert_close(test[3], torch.as_tensor(data.test.images[6]).permute(2, 0, 1) / 255)
    other, labels = problem.test_images(every=2, offset=1)
    assert labels.tolist() == data.test.labels[1::2].tolist() and not torch.equal(other, test)
    with pytest.raises(ArqError, match="there are 40"):
        problem.test_images(offset=40)
    blind = Evaluator(toy_problem(load=lambda: without(data, "test")), SMALL)
    blind.evaluate(uniform(problem.layers, 4, 4))
    assert blind.reference.acr > 0
    only_train = toy_problem(load=lambda: without(data, "test", "reward"))
    assert len(only_train.calibration_images()) == 320


def without(dataset, *parts):
    """A copy that lacks some of its parts."""
    lacking = copy.copy(dataset)
    vars(lacking).update(dict.fromkeys(parts))
    return lacking


def test_calibration_images_are_noisy_training_images(problem):
    images = problem.calibration_images()
    assert images.shape == (320, 3, 8, 8)
    assert images.std() == pytest.approx(0.55, abs=0.1) and images.min() < -0.5
    assert torch.equal(images, problem.calibration_images()) and not torch.equal(images, problem.calibration_images(seed=1))


def test_a_network_that_never_saw_noise_is_noticed(problem):
    """A classifier that goes astray as soon as a pixel leaves [0, 1] is right on clean images and helpless under noise."""

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_noise_is_new(problem)
    split = toy_dataset().reward
    colours = torch.as_tensor(split.images).float().mean((1, 2)).argmax(1)
    assert (colours.numpy() == split.labels).mean() > 0.9

    class Colour(ToyNet):
        def forward(self, images):
            outside = (images - images.clamp(0, 1)).abs().amax((1, 2, 3)) > 0
            return torch.where(outside[:, None], torch.tensor([1e3, 0.0, 0.0]), images.mean((2, 3)))

    with pytest.warns(UserWarning, match="not to be trained under this noise"):
        warn_if_noise_is_new(toy_problem(network=Colour().eval()))


def test_no_certified_image_is_an_error():
    class Wrong(ToyNet):
        def forward(self, images):
            return -images.mean((2, 3))

    with pytest.raises(ArqError, match="no more than luck"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = Evaluator(toy_problem(network=Wrong().eval()), SMALL).reference


@pytest.mark.parametrize("count", [0, 65])
def test_number_of_reward_images(problem, count):
    with pytest.raises(ArqError, match="there are 64"):
        problem.reward_images(count)


def test_sigma_out_of_range():
    with pytest.raises(ArqError, match="sigma"):
        toy_problem(sigma=0.0)


def test_comparison_is_paired_and_kept(problem, tmp_path, monkeypatch):
    evaluator = Evaluator(problem, SMALL)
    maps = {"W8A8": uniform(problem.layers, 8, 8), "W2A2": uniform(problem.layers, 2, 2)}
    settings = TestSettings(every=2, n0=10, n=50)
    first = compare_maps(evaluator, maps, settings, folder=tmp_path)
    assert list(first.certificates) == [FP32, "W8A8", "W2A2"]
    mean, error = first.difference("W8A8", FP32)
    assert abs(mean) < 0.05 and error < first.certificates[FP32].acr
    assert first.bops_fraction(FP32) == 1 and first.bops_fraction("W2A2") < first.bops_fraction("W8A8")
    document = first.document(evaluator)
    assert (
        document["acr_differences"]["W2A2 - W8A8"]["mean"]
        == paired_difference(first.certificates["W2A2"], first.certificates["W8A8"])[0]
    )
    assert "W2A2" in comparison_table(first) and "middle" in layer_table(problem.layers, maps["W2A2"])

    monkeypatch.setattr("arq_env.certification.sampling.Sampler.predict", lambda *a, **k: pytest.fail("certified again"))
    again = compare_maps(evaluator, maps, settings, folder=tmp_path)
    assert again.certificates["W2A2"].acr == first.certificates["W2A2"].acr
    monkeypatch.undo()
    changed = compare_maps(evaluator, {"W8A8": maps["W2A2"]}, settings, folder=tmp_path)  # another map under an old name
    assert changed.certificates["W8A8"].acr == first.certificates["W2A2"].acr


def test_results_belong_to_the_network(problem, tmp_path):
    """Two networks without a card, alike in all but one weight, do not share a table."""
    other = toy_problem(card={})
    with torch.no_grad():
        other.network.last.bias += torch.tensor([9.0, 0, 0])
    assert other.digest != toy_problem(card={}).digest == toy_problem(card={}).digest
    maps, settings = {"W8A8": uniform(problem.layers, 8, 8)}, TestSettings(every=4, n0=10, n=50)
    tables = [compare_maps(Evaluator(p, SMALL), maps, settings, folder=tmp_path).certificates[FP32].acr for p in (problem, other)]
    assert tables[0] != tables[1]


def test_training_mode_is_an_error():
    with pytest.raises(ArqError, match="eval"):
        toy_problem(network=ToyNet())


@pytest.mark.parametrize("method", REWARDS)
def test_every_method_can_be_the_reward(method):
    """FP32 is the reference under the same method: 8 bits are close to it, and a map is told from another."""
    evaluator = Evaluator(toy_problem(), CertifierSettings(images=32, n0=8, n=64, reward_method=method))
    fine = evaluator.evaluate(uniform(evaluator.problem.layers, 8, 8))
    assert 0 < fine.acr == pytest.approx(evaluator.reference.acr, rel=0.15)
    assert evaluator.evaluate(uniform(evaluator.problem.layers, 2, 2)).acr != fine.acr


class Agreement(Reward):
    """A reward of one's own: one class, and its entry in the table."""

    @staticmethod
    def samples(settings):
        return 1

    def prepare(self):
        self.expected = self.problem.network(self.images[0]).argmax(1)

    def judge(self, network):
        share = float((network(self.images[0]).argmax(1) == self.expected).float().mean())
        return Figures(share, share, share)


def test_a_reward_of_one_s_own(problem, monkeypatch):
    monkeypatch.setitem(REWARDS, "agreement", Agreement)
    evaluator = Evaluator(problem, dataclasses.replace(SMALL, reward_method="agreement", calibration_images=64))
    assert evaluator.reference.acr == 1 and evaluator.settings.forward_passes == 64 + 16
    assert 0.5 < evaluator.evaluate(uniform(problem.layers, 8, 8)).acr <= 1


def test_what_a_copied_evaluator_measured_stays(problem):
    """FP32's figures travel with it, images and noise do not, and the next map gets the reward that it gets here."""
    evaluator = Evaluator(problem, SMALL)
    evaluator.evaluate(uniform(problem.layers, 8, 8))
    copied = pickle.loads(pickle.dumps(evaluator))
    assert not {"images", "_kept_noisy"} & vars(copied._reward).keys() and "_fp32" in vars(copied._reward)
    got, expected = (one.evaluate(uniform(problem.layers, 3, 3)) for one in (copied, evaluator))
    assert (got.acr, got.clean_accuracy) == (expected.acr, expected.clean_accuracy)


def test_a_network_that_is_merely_surer_is_worth_the_same(problem):
    evaluator = Evaluator(problem, SMALL)

    class Surer(ToyNet):
        def forward(self, images):
            return 3 * super().forward(images)

    surer = Surer().eval()
    surer.load_state_dict(problem.network.state_dict())
    got, expected = evaluator.measure(lambda: surer), evaluator.reference
    assert (got.acr, got.clean_accuracy, got.certified_accuracy) == pytest.approx(
        (expected.acr, expected.clean_accuracy, expected.certified_accuracy), rel=1e-4
    )


def test_an_unknown_reward_method_is_an_error():
    with pytest.raises(ArqError, match="soft, cohen"):
        CertifierSettings(reward_method="magic")


def test_regained_bits_make_weights_finer_and_nothing_else(problem):
    """A map is judged as the one whose weights have a bit more, and places are compared accordingly."""
    as_it_is, finished = (Evaluator(problem, dataclasses.replace(SMALL, regained_bits=bits)) for bits in (0, 1))
    coarse, finer = (complete({"middle": Bits(weight, 3)}, problem.layers) for weight in (2, 3))
    got, expected = finished.evaluate(coarse), as_it_is.evaluate(finer)
    assert (got.acr, got.clean_accuracy) == (expected.acr, expected.clean_accuracy) != as_it_is.evaluate(coarse).acr
    assert finished.evaluate(uniform(problem.layers, 8, 8)).acr == as_it_is.evaluate(uniform(problem.layers, 8, 8)).acr
    for (layer, kind), effects in as_it_is.sensitivities.items():
        expected = [*effects[1:], 0.0] if kind == "weight" else effects
        assert finished.sensitivities[layer, kind] == expected
    with pytest.raises(ArqError, match="leaves out"):
        finished.evaluate({"middle": Bits(2, 2)})
    with pytest.raises(ArqError, match="regained_bits"):
        CertifierSettings(regained_bits=-1)


def test_settings_are_plain_numbers():
    """NumPy's are taken and turned into Python's, which JSON can hold; what is no whole number is refused."""
    given = CertifierSettings(images=np.int64(8), n=np.uint8(4), alpha=np.float32(0.5))
    assert given == CertifierSettings(images=8, n=4, alpha=0.5) and json.dumps(dataclasses.asdict(given))
    for field in dataclasses.fields(CertifierSettings):
        for wrong in (True, None, "4", 4.0, math.nan, [4], np.array([1, 2])):
            with pytest.raises(ArqError, match=field.name.replace("_", ".")):
                CertifierSettings(**{field.name: wrong})
    with pytest.raises(ArqError, match="regained_bits is 7: .* 0 to 6"):
        CertifierSettings(regained_bits=7)
