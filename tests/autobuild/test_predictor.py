"""The predictor and its training on a space small enough to see through."""

import numpy as np
import pytest
import torch
from small_space import random_codes, small_space

from autobuild import predictor_file, search, training
from autobuild import space as spaces
from autobuild.predictor import GraphTensors, Predictor, one_thread
from autobuild.scores import LearnedScores, nodes_before
from errors import InputError

EPOCHS = 15


@pytest.fixture(scope="module")
def space():
    return small_space()


@pytest.fixture(scope="module")
def setup(space):
    """Damage is the sum of errors, the first layer's a hundred times its own."""
    codes = random_codes(space, 120)
    weights = np.ones(len(space.keys))
    weights[0] = 20
    damage = (space.errors[np.arange(len(weights)), codes] * weights).sum(axis=1)
    return training.TrainingSetup(GraphTensors(space), codes, -np.log(damage), "hybrid", EPOCHS, 0)


@pytest.fixture(scope="module")
def folds(setup):
    return training.train(setup)


@pytest.fixture(scope="module")
def scores(space, folds):
    return LearnedScores(space, [folds[number].state for number in range(training.FOLDS)])


def test_it_learns_what_matters(folds, scores):
    assert np.mean([fold.metrics["srcc"] for fold in folds.values()]) > 0.85
    spread = np.ptp(scores.of_weights(), axis=1)
    assert spread.argmax() == 0 and spread[0] > 3 * np.median(spread)


def test_folds_share_the_rows(folds, setup):
    tests = [row for fold in folds.values() for row in fold.test]
    assert sorted(tests) == list(range(len(setup.targets)))
    for fold in folds.values():
        assert training.srcc(fold.predictions, setup.targets[fold.test]) == pytest.approx(fold.metrics["srcc"])


def test_the_same_seed_trains_the_same(setup, folds):
    with one_thread():  # as the processes that train folds
        again = training.train_fold(setup, 3)
    assert all(torch.equal(again.state[name], tensor) for name, tensor in folds[3].state.items())


def test_finished_folds_are_kept(setup, folds, folds_here):
    kept = []
    done = {number: folds[number] for number in (0, 1, 2, 4)}
    found = training.train(setup, lambda number, fold: kept.append(number), done)
    assert kept == [3] and found[0] is folds[0]
    assert found[3].predictions == folds[3].predictions


def test_embeddings_are_never_negative_and_damage_adds_up(space, setup):
    torch.manual_seed(0)
    predictor = Predictor(GraphTensors(space))
    codes = torch.from_numpy(setup.codes[:4])
    nodes = predictor.embed(codes)
    assert nodes.min() >= 0
    damages = predictor.damages(codes)
    assert {hop: each.shape[1] for hop, each in damages.items()} == {0: 13, 1: 2, 3: 2}
    assert torch.allclose(damages[0], nodes[:, predictor.tensors.weights].abs().sum(dim=2))


def test_contributions_add_up_to_predictions(space, setup, folds, scores):
    """Of units that see no others' weights; the constant is the same for all configurations."""
    codes = random_codes(space, 6, seed=9)
    predicted = sum(each(torch.from_numpy(codes))[0].detach().numpy() for each in scores.predictors) / training.FOLDS
    decisions = scores.decisions()
    totals = np.zeros(len(codes))
    for decision in decisions:
        for row, chosen in enumerate(codes[:, decision.weights]):
            totals[row] += decision.scores[(decision.codes == chosen).all(axis=1)][0]
    assert np.ptp(predicted - totals) < 1e-4 * np.ptp(predicted)


def test_what_is_seen_of_a_unit(space):
    attention = next(unit for unit in space.units if len(unit.weights) == 4)
    assert attention.hops == 3
    names = {node.name.split(".")[-2] for node in nodes_before(attention.root, 3) if node.is_weight}
    assert names == {"to_q", "to_k", "to_v", "0", "proj"}  # the first layer is three hops before, by way of the values


def test_the_papers_scores_are_standardized_and_weighted(scores, space):
    expected = 0
    for predictor, alone in zip(scores.predictors, scores.alone, strict=True):
        standard = (alone - predictor.hop_mean[0]) / predictor.hop_std[0]
        expected = expected - standard.numpy() * float(predictor.hop_srcc[0])
    assert np.allclose(scores.of_weights(), expected, atol=1e-5)
    single = next(decision for decision in scores.published_decisions() if len(decision.weights) == 1)
    assert np.allclose(single.scores, expected[single.weights[0]], atol=1e-4)


def test_the_search_spares_the_layer_that_matters(scores, space):
    codes = search.best_within(space, scores.decisions(), 3.5)
    assert codes[0] in (0, 2) and np.mean(space.errors[0, codes[0]] <= space.errors[0]) > 0.6


def test_files(tmp_path, space, setup, folds, monkeypatch):
    monkeypatch.setattr(spaces, "graph_and_keys", lambda family: (space.graph, space.keys))
    path, key = tmp_path / "p.pt", predictor_file.key_of(space, setup)
    predictor_file.save(path, space, key, {"target": "x"}, {1: folds[1]})
    with pytest.raises(InputError, match="was interrupted; the same"):
        predictor_file.load(path, space.family)
    assert list(predictor_file.load_folds(path, key)) == [1]
    assert predictor_file.load_folds(path, predictor_file.key_of(space, setup._replace(seed=1))) == {}
    predictor_file.save(path, space, key, {"target": "x"}, folds)
    read, states, told = predictor_file.load(path, space.family)
    assert told == {"target": "x"} and len(states) == training.FOLDS
    assert np.array_equal(read.size_bytes, space.size_bytes) and np.array_equal(read.errors, space.errors)
    with pytest.raises(InputError, match="is a predictor of pixart_alpha, not of dit"):
        predictor_file.load(path, "dit")
    torch.save({"a": 1}, path)
    with pytest.raises(InputError, match="is not a predictor"):
        predictor_file.load(path, space.family)
    assert predictor_file.load_folds(path, key) == {}
