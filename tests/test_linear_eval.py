"""linear_eval.py: what it trains and what it leaves alone, foreign weights, results, pictures."""

import argparse
import copy
import importlib
import io
import json
import math
import pickle
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.datasets.folder import default_loader

import common
import linear_eval
import simsiam
from conftest import ROOT, SCRIPTS, load, refused

FP32 = partial(torch.autocast, "cpu", torch.bfloat16, False)


@pytest.fixture
def run(whole_runs):
    """A function: the checkpoint of a method's two-epoch run on the small folder."""
    def path(name="simsiam"):
        module = importlib.import_module(name)
        return whole_runs(module)[0] / "checkpoint.pt"
    return path


@pytest.fixture
def small(folder):
    """The flags that name the small folder as the data set of foreign weights."""
    return ["--dataset", "folder", "--data-dir", folder, "--image-size", 32]


@pytest.fixture
def short_teacher(monkeypatch):
    """One epoch of fine-tuning by default, which is what a teacher gets."""
    monkeypatch.setitem(linear_eval.RECIPES, "finetune", (1, 0.05, 0.0))


def judge(*argv):
    """The accuracies that linear_eval.py returns."""
    return linear_eval.main([*map(str, argv), "--device", "cpu"])


def refuses(capsys, argv, *words, status=2):
    """linear_eval.py ends with one line of these words, and with this status."""
    argv = [*map(str, argv), "--device", "cpu"]
    refused(capsys, linear_eval, argv, *words, status=status)


def parse(*argv):
    """The arguments of a checkpoint x and these flags."""
    return linear_eval.parse_args(["x", *map(str, argv)])


def read_result(out):
    """The results in a folder that holds those of one evaluation."""
    (path,) = Path(out).glob("eval_*.json")
    return json.loads(path.read_text())


def pooled(*layers):
    """A small network: the mean colour of an image, then these layers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


def two_classes(images, labels, test=None, truth=None, mean=0.5, std=0.3):
    """A data set of the classes a and b; the training images are the default test images."""
    test = images if test is None else test
    truth = labels if truth is None else truth
    mean, std = torch.full((3,), mean), torch.full((3,), std)
    return common.Dataset(images, labels, test, truth, ("a", "b"), mean, std)


# ------------------------------------------------------------------------------ linear mode
@pytest.mark.parametrize("name", SCRIPTS)
def test_linear_mode_changes_no_bit_of_the_backbone(name, run, tmp_path):
    """Neither parameters nor buffers, by L-BFGS and by SGD on random crops."""
    before = load(run(name).parent)["backbone"]
    path = tmp_path / "b.pth"
    for more in ([], ["--augment"]):
        judge(run(name), "--epochs", 2, "--export", path, "--out", tmp_path, *more)
        after = torch.load(path, weights_only=True)
        assert before.keys() == after.keys()
        assert all(before[key].equal(after[key]) for key in before)
        path.unlink()


def fitted(bank, labels, queries, classes):
    """Probabilities by a logistic regression with scikit-learn's penalty (C = 1), by L-BFGS."""
    mean, std = bank.double().mean(0), bank.double().std(0, correction=0)
    std = std.where(std > 0, 1)
    x, q = ((part.double() - mean) / std for part in (bank, queries))
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], labels)
        loss = loss + weight[:-1].square().sum() / (2 * len(x))
        loss.backward()
        return loss
    optimizer.step(closure)
    return (q @ weight[:-1] + weight[-1]).softmax(1).detach()


@pytest.fixture(scope="module")
def shapes():
    """Drawn shapes, 2000 to train on and 1000 to test on, and an untrained network's features."""
    images, labels = common.draw_shapes(3000, 16)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.2)
    data = common.Dataset(images[:2000], labels[:2000], images[2000:], labels[2000:],
                          common.SHAPES, mean, std)
    torch.manual_seed(0)
    f = common.resnet(width=0.25)
    bank = simsiam.features(f, data.train_images, data, 500, FP32)
    queries = simsiam.features(f, data.test_images, data, 500, FP32)
    return data, bank, queries, fitted(bank, data.train_labels, queries, 10)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_linear_mode_is_logistic_regression(scale, shapes):
    """Whatever the scale of the features, with the defaults; within half a point."""
    data, bank, queries, theirs = shapes
    bank, queries = scale * bank, scale * queries
    keep = torch.arange(2000)
    end, head, _ = linear_eval.classify(
        nn.Identity(), bank, queries, keep, data, parse(), None)
    assert (head(queries).softmax(1) - theirs).abs().max() < 0.02
    right = (theirs.argmax(1) == data.test_labels).double().mean().item()
    assert abs(end["top1"] - 100 * right) < 0.5
    assert end["top5"] > end["top1"] > 25


def test_linear_mode_stops_after_as_many_iterations_as_epochs(shapes):
    """One iteration changes the classifier less than a thousand do."""
    data, bank, queries, _ = shapes
    keep, norms = torch.arange(1000), []
    for more in (["--epochs", "1"], []):
        _, head, used = linear_eval.classify(
            nn.Identity(), bank[:1000], queries, keep, data, parse(*more), None)
        norms.append(head[1].weight.norm())
        assert used["batch_size"] == 1000 and used["lr"] is None
    assert 0 < norms[0] < 0.5 * norms[1]


@pytest.mark.parametrize("constant", [0, 101])
@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_channel_that_is_constant_in_training_has_no_effect(mode, constant):
    """In half of the test images it differs, and batch norm makes the difference huge."""
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    images[20:, 0] = 200
    images[:, 2] = constant  # the variance of 101 / 255 is not 0, but of rounding errors
    test = images[10:30].clone()
    test[::2, 2] += 1
    labels = (torch.arange(40) >= 20).long()
    data = two_classes(images, labels, test, labels[10:30], 0.0, 1.0)
    network = pooled()
    bank, queries = (network(x.float() / 255) for x in (images, test))
    torch.manual_seed(0)
    args = parse("--mode", mode, "--epochs", "20")
    end, _, _ = linear_eval.classify(
        network, bank, queries, torch.arange(40), data, args, FP32)
    assert end["top1"] == 100


def test_accuracies_are_counted_by_hand(monkeypatch):
    """A classifier of known scores: right first 3 times in 6, all of class 0, of four classes."""
    scores = torch.tensor([[9, 1, 2, 3, 4, 5, 0.0]] * 6)
    truth = torch.tensor([0, 0, 0, 5, 3, 6])
    labels = torch.zeros(8, dtype=torch.long)
    data = common.Dataset(None, labels, None, truth, tuple("abcdefg"), None, None)
    monkeypatch.setattr(nn, "Sequential", lambda *layers: nn.Identity())
    monkeypatch.setattr(linear_eval, "fit", lambda *args: None)
    end, _, _ = linear_eval.classify(
        None, torch.zeros(8, 7), scores, torch.arange(8), data, parse(), None)
    assert end == {"top1": 50.0, "balanced": 25.0, "top5": 500 / 6}


# ------------------------------------------------------------------------------ training
@pytest.mark.parametrize("mode", ["finetune", "scratch"])
def test_the_other_modes_train_the_backbone(mode, run, tmp_path):
    before = load(run().parent)["backbone"]
    judge(run(), "--mode", mode, "--epochs", 1, "--export", tmp_path / "b.pth", "--out", tmp_path)
    after = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(not before[key].equal(after[key]) for key in before)
    distance = (before["conv1.weight"] - after["conv1.weight"]).norm()
    distance = distance / before["conv1.weight"].norm()  # of two random draws: sqrt(2)
    assert distance < 0.5 if mode == "finetune" else distance > 1


@pytest.mark.parametrize("mode, epochs, of", [
    ("linear", 20, "pre-trained"), ("finetune", 9, "pre-trained"), ("scratch", 12, "random")])
def test_separable_classes_are_told_apart(mode, epochs, of, run, folder, tmp_path, capsys):
    """Dark and light images: any backbone, any mode. The kNN is of the network before training."""
    end = judge(run(), "--mode", mode, "--epochs", epochs, "--out", tmp_path, "--knn", 1, 200)
    assert end["top1"] == end["top5"] == end["balanced"] == end["knn1"] == 100
    said = capsys.readouterr().out
    assert f"\n{mode}: top1=100.00 " in said
    assert f" {of} backbone)\n" in said and "knn200 uses k = 40" in said
    assert f"\nwrote {tmp_path}/eval_checkpoint_{mode}_{folder.name}.json\n" in said


@pytest.mark.parametrize("flags, states", [
    ([], {("judged", False)}),
    (["--augment"], {("judged", False), ("trained", False)}),
    (["--mode", "finetune"], {("judged", False), ("trained", True)})])
def test_only_a_network_that_learns_is_in_training_mode(
        flags, states, run, tmp_path, monkeypatch):
    """Whatever is judged, and a frozen backbone always, uses running statistics."""
    now, seen = ["judged"], set()
    forward, batch_loss = common.ResNet.forward, linear_eval.batch_loss

    def noted_forward(self, x):
        for module in self.modules():
            seen.add((now[0], module.training))
        return forward(self, x)

    def noted_loss(*args):
        now[0] = "trained"
        loss = batch_loss(*args)
        now[0] = "judged"
        return loss
    monkeypatch.setattr(common.ResNet, "forward", noted_forward)
    monkeypatch.setattr(linear_eval, "batch_loss", noted_loss)
    judge(run(), "--epochs", 1, "--out", tmp_path, *flags)
    assert seen == states


def test_training_takes_random_crops_and_flips_of_a_new_order_each_epoch():
    """By simsiam.py's batched operations: every image has its own crop."""
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    data = two_classes(images, torch.arange(20) % 2)
    network, seen = pooled(nn.Linear(3, 2)), []
    network[0].register_forward_hook(lambda module, x, y: seen.append(x[0].clone()))
    args = parse("--mode", "finetune", "--epochs", "2", "--seed", "3", "--batch-size", "9")
    linear_eval.classify(network, torch.zeros(20, 2), None, torch.arange(20), data, args, FP32)
    assert len(seen) == 2 * 2 + 1  # two steps an epoch, then the test images
    for epoch in (1, 2):
        torch.manual_seed(3 * 10**6 + epoch)
        order = torch.randperm(20)
        for step in (0, 1):
            x = images[order[9 * step:9 * step + 9]] / 255
            x = simsiam.random_resized_crop(x, 8, (0.08, 1.0))
            x = common.normalize(simsiam.random_flip(x), data.mean, data.std)
            assert seen[2 * (epoch - 1) + step].equal(x)


def test_operations_are_those_of_simsiam():
    """There is no second copy of them."""
    for name in ("features", "knn_accuracy", "random_flip", "random_resized_crop", "fail"):
        assert getattr(linear_eval, name) is getattr(simsiam, name)


def red_or_not():
    """Images of two classes, more or less red, and a small network with a ReLU at its end."""
    torch.manual_seed(0)
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = (images[:, 0].float().mean((1, 2)) > 127.5).long()
    return two_classes(images, labels), pooled(nn.Linear(3, 8), nn.ReLU())


def test_a_nearly_dead_channel_is_trained_no_faster_than_the_others():
    """A ReLU's output of tiny spread, as projectors have: batch norm must not magnify it."""
    data, network = red_or_not()
    with torch.no_grad():
        network[2].weight[0] *= 1e-5
        network[2].bias[0] = 0
        before = network[2].weight.clone()
    args = parse("--mode", "finetune", "--epochs", "3")
    linear_eval.classify(network, torch.zeros(64, 8), None, torch.arange(64), data, args, FP32)
    moved = (network[2].weight - before).detach().norm(dim=1)
    assert moved[1:].max() > 1e-4 and moved[0] < 3 * moved[1:].max()


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    flags = ["--mode", "finetune", "--epochs", 2, "--lr", "1e-4", "--out", tmp_path]
    assert judge(run(), *flags) == judge(run(), *flags)


def test_a_loss_that_is_not_finite_ends_training(run, tmp_path, capsys, monkeypatch):
    broken = torch.tensor(math.nan, requires_grad=True)
    monkeypatch.setattr(linear_eval, "batch_loss", lambda *args: broken * 1)
    argv = [run(), "--mode", "finetune", "--out", tmp_path]
    refuses(capsys, argv, "finetune: the loss is nan at epoch 1", "--lr", status=1)


def test_weights_that_are_not_finite_end_in_one_line(run, tmp_path, capsys):
    saved = load(run().parent)
    saved["backbone"]["conv1.weight"].fill_(math.nan)
    torch.save(saved, tmp_path / "checkpoint.pt")
    refuses(capsys, [tmp_path], "not finite", status=1)


# ------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize("flags, count, epochs, lr, decay, batch", [
    ([], 77, 1000, None, None, 77),
    (["--epochs", "9"], 77, 9, None, None, 77),
    (["--augment"], 5, 100, 0.1, 0, 5),
    (["--augment"], 100, 100, 0.1, 0, 8),
    (["--mode", "finetune"], 1000, 30, 0.05, 0, 62),
    (["--mode", "scratch"], 50_000, 100, 0.1, 5e-4, 256),
    (["--mode", "distill"], 50_000, 100, 0.06, 5e-4, 256),
    (["--mode", "distill", "--weight-decay", "0"], 50_000, 100, 0.06, 0, 256),
    (["--mode", "finetune", "--batch-size", "512", "--lr", "1"], 512, 30, 1, 0, 512)])
def test_the_recipe_follows_mode_flags_and_number_of_images(
        flags, count, epochs, lr, decay, batch):
    """A batch has 16 steps an epoch, but 8 to 256 images; the rate is linear in its size."""
    used = linear_eval.choose_recipe(parse(*flags), count)
    assert (used["epochs"], used["weight_decay"], used["batch_size"]) == (epochs, decay, batch)
    assert used["lr"] == (lr and lr * batch / 256)


def test_a_batch_size_that_is_given_is_obeyed_or_refused(run, tmp_path, capsys, monkeypatch):
    """The results hold what the optimizer got."""
    steps, rates = [], []
    batch_loss, optimizer = linear_eval.batch_loss, torch.optim.SGD

    def noted_loss(network, head, x, *args):
        steps.append(len(x))
        return batch_loss(network, head, x, *args)

    def noted_optimizer(parameters, lr, *args, weight_decay, **more):
        rates.append((lr, weight_decay))
        return optimizer(parameters, lr, *args, weight_decay=weight_decay, **more)
    monkeypatch.setattr(linear_eval, "batch_loss", noted_loss)
    monkeypatch.setattr(torch.optim, "SGD", noted_optimizer)
    flags = [run(), "--augment", "--out", tmp_path, "--lr", 0.1, "--weight-decay", 0.01]
    judge(*flags, "--batch-size", 17, "--epochs", 2)
    rate = 0.1 * 17 / 256
    assert steps == 4 * [17] and rates == [(rate, 0.01)]
    assert read_result(tmp_path)["used"] == {
        "epochs": 2, "lr": rate, "weight_decay": 0.01, "batch_size": 17, "labels": 40}
    argv = [*flags, "--batch-size", 41]
    refuses(capsys, argv, "--batch-size 41", "40 images")


@pytest.mark.parametrize("flag, value", [
    ("--lr", "1"), ("--weight-decay", "0"), ("--batch-size", "8")])
def test_flags_of_sgd_are_refused_for_lbfgs(flag, value, capsys):
    refuses(capsys, ["x", flag, value], flag, "--augment")
    parse(flag, value, "--augment")
    parse(flag, value, "--mode", "finetune")


# ------------------------------------------------------------------------------ distillation
@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_distill_loss_is_the_papers_equation(tau):
    """A loop typed from SimCLR v2's Eq. 2; no gradient to the teacher."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, generator=draw, requires_grad=True) for _ in range(2))

    def probability(logits, y):
        return math.exp(logits[y] / tau) / sum(math.exp(logit / tau) for logit in logits)
    total = 0
    for s, t in zip(student.tolist(), teacher.tolist()):
        for y in range(5):
            total -= probability(t, y) * math.log(probability(s, y))
    loss = linear_eval.distill_loss(student, teacher, tau)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    loss.backward()
    softened = [F.softmax(x.detach() / tau, 1) for x in (student, teacher)]
    assert torch.allclose(student.grad, (softened[0] - softened[1]) / 4 / tau, atol=1e-5)
    assert teacher.grad is None


def test_a_low_temperature_trains_the_backbone_as_a_high_one():
    """A teacher that is sure at any tau: the same student, to rounding, and its network moves."""
    data, network = red_or_not()
    data = data._replace(train_labels=torch.full((64,), 99))  # no class: it is not used
    head, students = nn.Linear(3, 2, bias=False), []
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1e6] * 3, [1e6] * 3]))
    for tau in ("0.1", "1"):
        args = parse("--mode", "distill", "--epochs", "3", "--distill-tau", tau)
        student = copy.deepcopy(network)
        linear_eval.classify(student, torch.zeros(64, 8), None, torch.arange(64), data, args,
                             FP32, (network[:2], head))
        students.append(student[2].weight.detach())
    low, high = students
    assert torch.allclose(low, high, atol=1e-6) and (low - network[2].weight).norm() > 1e-3


def test_distillation_begins_with_fine_tuning(run, folder, tmp_path, capsys, monkeypatch):
    """The teacher is --mode finetune's network, to the bit, whatever the student's flags are."""
    monkeypatch.setitem(linear_eval.RECIPES, "finetune", (9, 0.05, 0.0))
    flags = ["--label-fraction", 0.2, "--out", tmp_path]
    taught = judge(run(), "--mode", "finetune", *flags)
    capsys.readouterr()
    both = judge(run(), "--mode", "distill", *flags, "--epochs", 2, "--lr", 0.01)
    for key in ("top1", "balanced", "top5"):
        assert both[f"teacher_{key}"] == taught[key]
    said = capsys.readouterr().out
    assert f"distill: top1={both['top1']:.2f} " in said
    assert f" teacher_top1={both['teacher_top1']:.2f} " in said
    path = tmp_path / f"eval_checkpoint_distill_{folder.name}.json"
    kept = json.loads(path.read_text())
    assert {key: kept[key] for key in both} == both
    assert kept["used"] == {  # the student's recipe, and the labels that its teacher saw
        "epochs": 2, "lr": 0.01 * 8 / 256, "weight_decay": 5e-4, "batch_size": 8, "labels": 8}


def test_the_student_sees_all_images_and_leaves_its_teacher_alone(
        run, tmp_path, monkeypatch, short_teacher):
    """8 images with labels teach the teacher, all 40 the student, which is exported."""
    calls, taus, train, loss = [], [], linear_eval.train, linear_eval.distill_loss

    def noted_train(network, head, keep, data, args, used, autocast, teacher):
        parts = teacher or ()
        before = [copy.deepcopy(part.state_dict()) for part in parts]
        assert not any(module.training for part in parts for module in part.modules())
        train(network, head, keep, data, args, used, autocast, teacher)
        for part, old in zip(parts, before):  # the batch norms' statistics, too
            assert all(x.equal(old[key]) for key, x in part.state_dict().items())
        calls.append((network, keep))

    def noted_loss(student, teacher, tau):
        taus.append(tau)
        return loss(student, teacher, tau)
    monkeypatch.setattr(linear_eval, "train", noted_train)
    monkeypatch.setattr(linear_eval, "distill_loss", noted_loss)
    judge(run(), "--mode", "distill", "--label-fraction", 0.2, "--head-layers", 1, "--epochs", 1,
          "--distill-tau", 2, "--export", tmp_path / "b.pth", "--out", tmp_path)
    (teacher, few), (student, everything) = calls
    assert len(few) == 8 and sorted(everything.tolist()) == [*range(40)]
    assert {*taus} == {2.0}
    assert teacher is not student and len(teacher) == len(student) == 4  # f and g's first layer
    kept = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(x.equal(kept[key]) for key, x in student[0].state_dict().items())


def test_a_student_learns_all_images_from_its_teacher_alone():
    """The teacher knows the classes by their colour and keeps every bit; labels are not used."""
    images = torch.randint(100, (60, 3, 8, 8), dtype=torch.uint8)
    images[30:] += 120
    truth = (torch.arange(60) >= 30).long()
    wrong = torch.full((60,), 99)  # no class
    data = two_classes(images, wrong, images, truth, 0.4)
    student, head = pooled(nn.Linear(3, 4)), nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-9.0] * 3, [9.0] * 3]))
        head.bias.zero_()
    norm = nn.BatchNorm1d(3, affine=False)  # would move if it were trained
    teacher = (pooled().eval(), nn.Sequential(norm, head).eval())
    before = copy.deepcopy(teacher[1].state_dict())
    seen = {"teacher": [], "student": []}
    for name, network in (("teacher", teacher[0]), ("student", student)):
        network[0].register_forward_hook(
            lambda module, x, y, name=name: seen[name].append(x[0].clone()))
    args = parse("--mode", "distill", "--epochs", "40", "--lr", "1")
    end, _, _ = linear_eval.classify(
        student, torch.zeros(60, 4), None, torch.arange(60), data, args, FP32, teacher)
    assert end["top1"] == 100
    assert all(x.equal(before[key]) for key, x in teacher[1].state_dict().items())
    assert all(x.grad is None for x in teacher[1].parameters())
    assert len(seen["teacher"]) == 40 * 7  # batches of 8
    assert all(x.equal(y) for x, y in zip(seen["teacher"], seen["student"]))  # the same views


# ------------------------------------------------------------------------------ labels, splits
def test_few_labels_are_balanced_seeded_and_enough():
    """Of the images that are named alone, here all but the first ten."""
    labels = torch.tensor([0] * 110 + [1] * 50 + [2] * 3)
    indices = torch.arange(10, 163)
    keep = linear_eval.few_labels(indices, labels, 0.1, 0)
    assert labels[keep].bincount().tolist() == [10, 5, 1]
    assert len(keep.unique()) == 16 and keep.min() >= 10
    assert keep.equal(linear_eval.few_labels(indices, labels, 0.1, 0))
    assert not keep.equal(linear_eval.few_labels(indices, labels, 0.1, 1))
    assert linear_eval.few_labels(indices, labels, 1.0, 0).sort().values.equal(indices)


def test_hidden_labels_are_not_read(run, folder, tmp_path, monkeypatch, short_teacher):
    """The same result when every hidden label is wrong."""
    ends, read = [], common.load_dataset
    labels = read("folder", folder, 16).train_labels
    keep = linear_eval.few_labels(torch.arange(40), labels, 0.2, 0)
    monkeypatch.setattr(linear_eval, "few_labels", lambda *args: keep)

    def spoiled(*args):
        wrong = 1 - labels
        wrong[keep] = labels[keep]
        return read(*args)._replace(train_labels=wrong)
    for function in (read, spoiled):
        monkeypatch.setattr(linear_eval, "load_dataset", function)
        for mode in ("linear", "distill"):
            ends.append(judge(run(), "--label-fraction", 0.2, "--epochs", 3, "--mode", mode,
                              "--out", tmp_path))
    assert ends[:2] == ends[2:]


@pytest.fixture
def unsplit(folder, tmp_path):
    """The flags that name a folder of 40 images in two classes without a test split."""
    return ["--data-dir", folder / "train", "--cache-dir", tmp_path / "cache"]


def test_without_a_test_split_a_fifth_of_each_class_is_held_out(run, unsplit, tmp_path, capsys):
    end = judge(run(), *unsplit, "--knn", 200, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "no test split: 8 images, a fifth of each class, are held out\n" in said
    assert "knn200 uses k = 32" in said
    kept = read_result(tmp_path)
    assert (kept["images"], kept["test_images"], kept["held_out"]) == (32, 8, 8)
    assert kept["used"]["labels"] == 32 and end["top1"] > 50


def test_images_that_are_held_out_depend_on_the_seed_alone(unsplit):
    about = {"pixels": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    flags = ["--dataset", "folder", *unsplit]
    drawn = []
    for more in ([], ["--label-fraction", "0.5"], ["--seed", "1"]):
        data, used = linear_eval.load_images(parse(*flags, *more), about, {}, torch.device("cpu"))
        assert data.test_labels.bincount().tolist() == [4, 4]
        assert data.train_labels[used].bincount().tolist() == [16, 16]
        trained = {image.numpy().tobytes() for image in data.train_images[used]}
        assert not any(image.numpy().tobytes() in trained for image in data.test_images)
        drawn.append(data.test_images)
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


@pytest.mark.parametrize("split", ["a test split", "images that are held out"])
@pytest.mark.parametrize("flags", [
    [], ["--augment"], ["--mode", "distill"]])
def test_no_test_image_takes_part_in_training(
        split, flags, run, unsplit, tmp_path, monkeypatch, short_teacher):
    """Training ends in the same bits when all test images and their labels are others."""
    load_images, classify = linear_eval.load_images, linear_eval.classify
    argv = unsplit if split == "images that are held out" else []
    heads = []

    def spoiled(*args):
        data, used = load_images(*args)
        images, labels = data.train_images.clone(), data.train_labels.clone()
        others = torch.ones(len(images), dtype=torch.bool)
        others[used] = False
        assert others.sum() == (8 if argv else 0)
        images[others] = 255 - images[others]
        labels[others] = 0
        data = data._replace(train_images=images, train_labels=labels)
        zeros = torch.zeros_like(data.test_labels)
        return data._replace(test_images=255 - data.test_images, test_labels=zeros), used

    def noted(*args):
        results = classify(*args)
        heads.append(results[1].state_dict())
        return results
    monkeypatch.setattr(linear_eval, "classify", noted)
    for number, function in enumerate((load_images, spoiled)):
        monkeypatch.setattr(linear_eval, "load_images", function)
        judge(run(), "--epochs", 1, "--out", tmp_path, *flags, *argv,
              "--export", tmp_path / f"{number}.pth")
    whole, other = (torch.load(tmp_path / f"{number}.pth") for number in (0, 1))
    assert all(x.equal(other[key]) for key, x in whole.items())
    half = len(heads) // 2
    assert half == (2 if "distill" in flags else 1)
    for head, spoiled_head in zip(heads[:half], heads[half:]):
        assert head["1.weight"].norm() > 0
        assert all(x.equal(spoiled_head[key]) for key, x in head.items())


# ------------------------------------------------------------------------------ heads
@pytest.mark.parametrize("name", SCRIPTS)
def test_head_layers_are_the_first_layers_of_the_projector(name, run):
    """All layers kept: the projector's own output; fewer: what enters its next linear layer."""
    saved = load(run(name).parent)
    build = partial(common.resnet, "resnet18", 0.25)
    module = importlib.import_module(name)
    model = module.Model(build, argparse.Namespace(**saved["args"]))
    model.load_state_dict(saved["model"])
    g, x = model.g.eval(), torch.randn(5, 128)
    last = max(i for i, layer in enumerate(g) if isinstance(layer, nn.Linear))
    assert linear_eval.load_head(saved, build, name, 0) == []
    first = linear_eval.load_head(saved, build, name, 1).eval()
    assert first(x).equal(g[:last](x))
    whole = linear_eval.load_head(saved, build, name, 2).eval()
    assert whole(x).equal(g(x))
    with pytest.raises(common.UserError, match="--head-layers 3.*has 2 layers"):
        linear_eval.load_head(saved, build, name, 3)


def test_features_behind_head_layers_are_judged(run, tmp_path, capsys):
    network, _, _ = linear_eval.load_network(parse("--head-layers", "1"), run())
    assert network.eval()(torch.randn(2, 3, 16, 16)).shape == (2, 2048)
    judge(run(), "--head-layers", 1, "--epochs", 1, "--out", tmp_path)
    refuses(capsys, [run(), "--head-layers", "3"], "2 layers")
    scratch = [run(), "--head-layers", "1", "--mode", "scratch"]
    refuses(capsys, scratch, "--head-layers")


def test_head_layers_need_a_checkpoint_of_the_four_methods(run, resnet18, tmp_path, capsys):
    """No other module that a file may name is imported."""
    saved = load(run().parent)
    saved["args"]["method"] = "this"
    torch.save(saved, tmp_path / "other.pt")
    torch.save(resnet18, tmp_path / "w.pth")
    for name in ("other.pt", "w.pth"):
        argv = [tmp_path / name, "--head-layers", 1]
        refuses(capsys, argv, "--head-layers needs a checkpoint of simclr")
    assert "this" not in sys.modules


# ------------------------------------------------------------------------------ flags
def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(capsys, ["x"], "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "")  # as some schedulers leave it
    refuses(capsys, ["none.pt"], "none.pt")


def test_a_checkpoint_behind_a_list_of_numbers_is_asked_to_stand_first(capsys):
    for argv in (["--knn", "5", "x.pt"], ["--mean", "0", "0", "0"], []):
        refuses(capsys, argv, "CHECKPOINT")


# ------------------------------------------------------------------------------ checkpoints
def test_a_folder_of_a_run_means_its_checkpoint(run, folder, tmp_path, capsys):
    """Its settings are the checkpoint's, and the results are written into it."""
    shutil.copy(run(), tmp_path / "checkpoint.pt")
    end = judge(tmp_path, "--epochs", 5)
    assert " read as " not in capsys.readouterr().out  # nothing was assumed
    kept, saved = read_result(tmp_path), load(tmp_path)
    assert (tmp_path / f"eval_checkpoint_linear_{folder.name}.json").exists()
    assert {key: kept[key] for key in end} == end
    network = ["resnet18", 0.25, "3x3", "no max-pool", 16]
    assert [kept[key] for key in ("arch", "width", "stem", "pool", "pixels")] == network
    assert kept["mean"] == saved["mean"].tolist() and kept["std"] == saved["std"].tolist()
    assert (kept["method"], kept["epoch"], kept["data"]) == ("simsiam", 2, folder.name)
    assert (kept["images"], kept["test_images"]) == (40, 12)
    assert kept["knn_of"] == "pre-trained" and kept["args"]["mode"] == "linear"
    assert kept["used"] == {
        "epochs": 5, "lr": None, "weight_decay": None, "batch_size": 40, "labels": 40}
    assert kept["torch"] == torch.__version__ and kept["device"].startswith("1 x cpu")
    assert kept["seconds"] > 0 and not kept["bf16"] and "commit" in kept


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    refuses(capsys, [tmp_path], f"{tmp_path}/checkpoint.pt")


def test_flags_replace_what_the_checkpoint_says(run, tmp_path):
    scale = ["--mean", 0, 0, -0.1, "--std", 1, 1, 2]
    judge(run(), *scale, "--image-size", 24, "--epochs", 1, "--precision", "bf16",
          "--out", tmp_path)
    kept = read_result(tmp_path)
    assert kept["pixels"] == 24 and kept["bf16"]
    assert kept["mean"] == [0, 0, -0.1] and kept["std"] == [1, 1, 2]


@pytest.mark.parametrize("flags, expected", [
    ([], ("folder", "birds", 16, "kept", True, 10**9)),
    (["--cache-dir", "other"], ("folder", "birds", 16, "other", True, 10**9)),
    (["--no-skip-broken"], ("folder", "birds", 16, "kept", False, 10**9)),
    (["--max-pixels", 5], ("folder", "birds", 16, "kept", True, 5)),
    (["--data-dir", "fish"], ("folder", "fish", 16, None, None, None)),
    (["--dataset", "shapes"], ("shapes", "data", 16, None, None, None))])
def test_the_data_are_the_checkpoints_unless_flags_name_others(flags, expected, monkeypatch):
    """What a run said of its folder does not hold for another one."""
    trained = {"dataset": "folder", "data_dir": "birds", "cache_dir": "kept",
               "skip_broken": True, "max_pixels": 10**9}
    about = {"pixels": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    calls = []

    def read(name, data_dir, image_size, cache_dir, device, skip_broken, max_pixels):
        calls.append((name, data_dir, image_size, cache_dir, skip_broken, max_pixels))
        return two_classes(torch.zeros(4, 3, 8, 8), torch.arange(4) % 2)
    monkeypatch.setattr(linear_eval, "load_dataset", read)
    data, used = linear_eval.load_images(parse(*flags), about, trained, torch.device("cpu"))
    assert calls == [expected] and used.tolist() == [0, 1, 2, 3]
    assert data.mean.tolist() == [0.5] * 3
    assert data.std.tolist() == pytest.approx([0.2] * 3)
    name, data_dir = expected[:2]
    assert about["data"] == (data_dir if name == "folder" else name)


def test_a_prefix_chooses_a_network_of_a_checkpoint_and_keeps_all_else(run, tmp_path, capsys):
    """MoCo's slow copy, with the mean, std, image size and data of its run."""
    saved = load(run("moco").parent)
    path = tmp_path / "b.pth"
    judge(run("moco"), "--prefix", "f_k.", "--epochs", 1, "--export", path, "--out", tmp_path)
    after = torch.load(path, weights_only=True)
    assert not after["conv1.weight"].equal(saved["backbone"]["conv1.weight"])
    assert all(x.equal(saved["model"][f"f_k.{key}"]) for key, x in after.items())
    kept = read_result(tmp_path)
    assert kept["mean"] == saved["mean"].tolist() and kept["std"] == saved["std"].tolist()
    assert (kept["method"], kept["pixels"], kept["images"]) == ("moco", 16, 40)
    argv = [run("moco"), "--prefix", "foo."]
    refuses(capsys, argv, "--prefix 'foo.' fits 0 of 3 ", "model.f_k.")


# ------------------------------------------------------------------------------ foreign weights
@pytest.fixture(scope="module")
def resnet18():
    """The weights of a small ResNet-18 in torchvision's names, with a classifier."""
    torch.manual_seed(0)
    weights = common.resnet("resnet18", 0.25, "imagenet").state_dict()
    return weights | {"fc.weight": torch.zeros(5, 128), "fc.bias": torch.zeros(5)}


def under(prefix, weights):
    """The weights with a prefix before all names."""
    return {prefix + name: x for name, x in weights.items()}


def forms(plain):
    """What projects save: the content, the --prefix that is needed, the number of tensors left."""
    head, norm = {"projection_head.0.weight": torch.zeros(2, 5)}, torch.zeros(1, 3, 1, 1)
    other = {"conv1.weight": torch.zeros(16, 3, 7, 7)}
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6",
               "layer4": "7", "fc": "fc"}
    numbered = {re.sub(r"^\w+", lambda first: numbers[first[0]], name): x
                for name, x in plain.items()}
    return {
        "torchvision": (plain, "", 2),
        "MoCo": ({"epoch": 3, "state_dict": {
            **under("module.encoder_q.", plain), **under("module.encoder_k.", other),
            "module.queue": norm}}, "module.encoder_q.", 4),
        "DINO": ({"student": under("module.backbone.", other),
                  "teacher": {**under("backbone.", plain), **head}}, "teacher.backbone.", 4),
        "SwAV": (under("module.", {**plain, **head, "prototypes.weight": norm}), "", 4),
        "robustness": ({"model": {
            **under("model.", plain), "normalizer.new_mean": norm}}, "", 3),
        "lightly": (under("backbone.", numbered) | head, "", 3),
        # A layer with three inputs is no first convolution of a network for RGB images.
        "linear layer of three inputs": (
            {**plain, "rotation.0.weight": torch.zeros(2, 3)}, "", 3),
        "some keys of ours": ({"backbone": plain, "model": 3, "args": {}}, "", 2)}


@pytest.mark.parametrize("form", forms({}))
def test_foreign_weights_are_read_whole_and_one_line_says_how(form, resnet18, tmp_path, capsys):
    """What was assumed, and what of the file is not used; a head is none of the backbone."""
    saved, prefix, unused = forms(resnet18)[form]
    torch.save(saved, tmp_path / "w.pth")
    args = parse("--prefix", prefix)
    network, about, trained = linear_eval.load_network(args, tmp_path / "w.pth")
    assert trained == {} and len(network) == 1
    assert all(x.equal(resnet18[key]) for key, x in network[0].state_dict().items())
    said, error = capsys.readouterr()
    assert f" read as {about}" in said and said.count("\n") == 1 and error == ""
    _, _, what = said.partition(str(about))
    assert re.search(r"\d+", what)[0] == str(unused)
    assert about["mean"] == (0.485, 0.456, 0.406) and about["pixels"] == 224
    assert [about[key] for key in ("arch", "width", "stem")] == ["resnet18", 0.25, "7x7"]
    for name in ("projection_head.0.weight", "prototypes.weight", "normalizer.new_mean"):
        present = any(key.endswith(name) for key, _ in common.all_tensors(saved))
        assert (name in what) == present


def test_a_loaded_backbone_is_torchvisions_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    network, _, _ = linear_eval.load_network(parse(), tmp_path / "w.pth")
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(network.eval()(x), theirs.eval()(x), atol=1e-4)


@pytest.mark.parametrize("arch, width", [
    ("resnet18", 0.25), ("resnet18", 0.3), ("resnet50", 0.5)])
def test_the_width_of_foreign_weights_is_read_off_them(arch, width, tmp_path):
    """As SimCLR's 2x, which doubles every channel count."""
    weights = common.resnet(arch, width, "imagenet").state_dict()
    torch.save(weights, tmp_path / "w.pth")
    network, about, _ = linear_eval.load_network(parse("--arch", arch), tmp_path / "w.pth")
    assert about["width"] == pytest.approx(width, abs=0.001)
    assert all(x.equal(weights[key]) for key, x in network[0].state_dict().items())


def test_the_width_of_a_run_is_the_one_it_was_trained_with(run, tmp_path):
    """At 0.333 the last stage, of 170 channels, tells of 42 in the second, which has 43."""
    saved = torch.load(run(), weights_only=True)
    saved["args"]["width"] = 0.333
    saved["backbone"] = common.resnet("resnet18", 0.333, "cifar").state_dict()
    torch.save(saved, tmp_path / "checkpoint.pt")
    network, about, _ = linear_eval.load_network(parse(), tmp_path / "checkpoint.pt")
    assert about["width"] == 0.333
    loaded = network[0].state_dict()
    assert all(x.equal(saved["backbone"][key]) for key, x in loaded.items())


@pytest.mark.parametrize("kernel", ["3x3", "7x7"])
@pytest.mark.parametrize("stem", [None, "cifar", "imagenet"])
def test_the_stem_flag_says_whether_foreign_weights_have_a_max_pool(kernel, stem, tmp_path):
    """Weights do not tell it; without the flag a kernel of 3x3 has none, one of 7x7 has one."""
    f = common.resnet("resnet18", 0.25, "cifar" if kernel == "3x3" else "imagenet")
    torch.save(f.state_dict(), tmp_path / "w.pth")
    pooling = stem == "imagenet" or (stem is None and kernel == "7x7")
    f.maxpool = nn.MaxPool2d(3, 2, 1) if pooling else nn.Identity()
    argv = ["--stem", stem] if stem else []
    network, about, _ = linear_eval.load_network(parse(*argv), tmp_path / "w.pth")
    x = torch.randn(2, 3, 32, 32)
    assert network.eval()(x).equal(f.eval()(x))
    assert about["stem"] == kernel and ("no max-pool" in about["pool"]) != pooling


def test_foreign_weights_are_judged_with_imagenet_statistics(resnet18, small, tmp_path, folder):
    torch.save(resnet18, tmp_path / "w.pth")
    end = judge(tmp_path / "w.pth", *small, "--epochs", 5)
    kept = read_result(tmp_path)
    assert end["top1"] == 100 and (tmp_path / f"eval_w_linear_{folder.name}.json").exists()
    assert kept["mean"] == [0.485, 0.456, 0.406] and kept["std"] == [0.229, 0.224, 0.225]
    assert kept["pixels"] == 32 and "method" not in kept


def test_weights_that_do_not_fit_are_refused_and_listed(resnet18, tmp_path, capsys):
    lacking = {key: x for key, x in resnet18.items() if key != "layer3.0.conv2.weight"}
    more = {**resnet18, "layer4.2.conv1.weight": torch.zeros(1)}
    conv1 = {"conv1.weight": resnet18["conv1.weight"]}
    mocos = under("encoder_q.", conv1) | under("encoder_k.", conv1)
    for weights, flags, *words in (
            (lacking, [], 'Missing key(s) in state_dict: "layer3.0.conv2.weight"'),
            (more, [], 'Unexpected key(s) in state_dict: "layer4.2.conv1.weight"'),
            ({**resnet18, "layer1.0.conv1.weight": torch.zeros(9, 64, 3, 3)}, [], "size mismatch"),
            (resnet18, ["--arch", "resnet50"], "layer1.0.conv3.weight", "--arch"),
            (mocos, [], "fits 2 of 2", "encoder_q. encoder_k.", "--prefix"),
            (mocos, ["--prefix", "encoder."], "--prefix 'encoder.' fits 0"),
            ({"fc.weight": torch.zeros(1)}, [], "fits 0 of 0"),
            (torch.zeros(3), [], "file of weights"),
            (conv1, [], 'Missing key(s) in state_dict: "bn1')):
        torch.save(weights, tmp_path / "w.pth")
        argv = [tmp_path / "w.pth", "--dataset", "shapes", *flags]
        refuses(capsys, argv, *words)
    refuses(capsys, [tmp_path / "none.pth"], "none.pth")
    assert not [*tmp_path.glob("*.json")]


def test_old_weights_without_batch_counts(resnet18, tmp_path):
    old = {key: x for key, x in resnet18.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "w.pth")
    network, _, _ = linear_eval.load_network(parse(), tmp_path / "w.pth")
    assert network[0].bn1.weight.equal(resnet18["bn1.weight"])


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)
    torch.save({"state_dict": Bomb()}, tmp_path / "w.pth")
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb(), 2))
    for name in ("w.pth", "x.pth"):
        refuses(capsys, [tmp_path / name], "file of weights")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------ exports
def test_an_export_is_a_torchvision_resnet_and_a_detector_body(small, tmp_path, capsys):
    """Only fc.* is missing; Faster R-CNN's body takes every weight and runs."""
    path = tmp_path / "b.pth"
    torch.save(common.resnet("resnet50", stem="imagenet").state_dict(), tmp_path / "w.pth")
    judge(tmp_path / "w.pth", "--arch", "resnet50", *small, "--epochs", 1, "--export", path)
    said, error = capsys.readouterr()
    assert "note:" not in said and error == ""
    weights = torch.load(path, weights_only=True)
    left = torchvision.models.resnet50().load_state_dict(weights, strict=False)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=21, min_size=64, max_size=64)
    left = detector.backbone.body.load_state_dict(weights)
    assert not left.missing_keys and not left.unexpected_keys
    body = detector.backbone.body
    assert body.layer4[2].conv3.weight.equal(weights["layer4.2.conv3.weight"])
    detector.train()
    boxes, labels = torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([1])
    losses = detector([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": labels}])
    assert all(math.isfinite(x.item()) for x in losses.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoints_backbone_has_torchvisions_names(name, run):
    """At width 1 and the ImageNet stem these names are torchvision's ResNet-18 without fc."""
    ours = load(run(name).parent)["backbone"]
    theirs = torchvision.models.resnet18().state_dict()
    assert [*ours] == [key for key in theirs if not key.startswith("fc.")]


def test_an_export_that_torchvision_cannot_load_says_what_can(run, tmp_path, capsys):
    path = tmp_path / "b.pth"
    judge(run(), "--epochs", 1, "--out", tmp_path, "--export", path)
    said = capsys.readouterr().out
    note = re.search(rf"(?m)^note: .*{path}.*\('(\w+)', ([\d.]+).*\).* (\dx\d) stem$", said)
    assert note[3] == "3x3"
    f = common.resnet(note[1], float(note[2]), "cifar")
    f.load_state_dict(torch.load(path, weights_only=True))


def test_an_export_is_judged_alike_by_the_mean_and_std_of_its_results(run, small, tmp_path):
    """As README says: the data and both statistics are typed again, from the JSON."""
    end = judge(run(), "--epochs", 9, "--out", tmp_path, "--export", tmp_path / "b.pth")
    used = read_result(tmp_path)
    typed = [word for key in ("mean", "std") for word in (f"--{key}", *used[key])]
    again = judge(tmp_path / "b.pth", *small[:-1], 16, "--epochs", 9, *typed,
                  "--out", tmp_path / "again")
    assert again == end and read_result(tmp_path / "again")["mean"] == used["mean"]
    assert used["mean"] == load(run().parent)["mean"].tolist()


# ------------------------------------------------------------------------------ pictures
def pixels(path):
    return torchvision.transforms.functional.pil_to_tensor(default_loader(str(path)))


def cells(path, side):
    """The images (3, side, side) of a picture of neighbours, without frames, in its rows."""
    picture, step = pixels(path), side + 8
    height, width = picture.shape[1:]
    rows = []
    for top in range(5, height, step):
        row = picture[:, top:top + side]
        rows.append([row[:, :, left:left + side] for left in range(5, width, step)])
    return rows


def grey(count, step):
    """Images of 64 pixels of one grey each, so that a picture tells their numbers."""
    values = torch.arange(count, dtype=torch.uint8) * step
    return values[:, None, None, None].expand(count, 3, 64, 64)


def test_neighbours_are_the_nearest_and_framed_by_class(tmp_path):
    """Features on a circle, of any length: the ten nearest by angle."""
    def number(cell):
        return int(cell[0, 0, 0]) // 10

    angle = torch.linspace(0, 1, 20)
    bank = torch.stack([angle.cos(), angle.sin()], 1)
    bank = bank * torch.linspace(1, 9, 20)[:, None]
    images, labels, ends = grey(20, 10), torch.arange(20) // 10, [0, 19]
    linear_eval.draw_neighbours(tmp_path / "n.png", bank, images, labels, bank[ends],
                                images[ends], labels[ends])
    first, second = ([number(cell) for cell in row] for row in cells(tmp_path / "n.png", 64))
    assert first == [0, *range(10)] and second == [19, *range(19, 9, -1)]
    corners = pixels(tmp_path / "n.png")[:, 3, 72 + 3::72]  # in the frames of the first row
    assert (corners[1] > corners[0]).all()  # all green
    linear_eval.draw_neighbours(tmp_path / "s.png", bank, images, labels, bank, images, labels)
    rows = cells(tmp_path / "s.png", 64)
    assert number(rows[0][1]) == 1  # not itself
    shown = [number(cell) for cell in rows[4]]
    assert shown[0] in (8, 9)
    nearest = {*range(shown[0] - 5, shown[0] + 6)} - {shown[0]}
    assert {*shown[1:]} == nearest
    corners = pixels(tmp_path / "s.png")[:, 4 * 72 + 3, 3::72]
    for i, index in enumerate(shown[1:], 1):
        green = corners[1, i] > corners[0, i]
        assert green == (index < 10)  # 10 and above are of the other class, and red
    bank[2:] = 0  # left out: of two images, each has one neighbour
    linear_eval.draw_neighbours(tmp_path / "t.png", bank, images, labels, bank[:2], images, labels)
    shown = [[number(cell) for cell in row] for row in cells(tmp_path / "t.png", 64)]
    assert shown == [[0, 1], [1, 0]]


def test_an_image_that_is_held_out_is_no_neighbour(run, unsplit, tmp_path):
    """Neighbours are images of the training split, of which the held-out ones are no part."""
    path = tmp_path / "n.png"
    judge(run(), *unsplit, "--epochs", 1, "--out", tmp_path, "--neighbours", path)
    rows = cells(path, 64)
    assert len(rows) == 8 and {len(row) for row in rows} == {11}
    held_out = {row[0].numpy().tobytes() for row in rows}
    for row in rows:
        assert not any(cell.numpy().tobytes() in held_out for cell in row[1:])


def test_the_map_shows_each_image_once_and_in_order(tmp_path):
    """Features on a plane: columns follow the widest axis, rows the other; with colours a class."""
    draw = torch.Generator().manual_seed(0)
    plane = torch.rand(16, 2, generator=draw) * torch.tensor([1.0, 0.1])
    queries = torch.cat([plane, torch.ones(16, 1)], 1)
    images = grey(16, 15)
    linear_eval.draw_map(tmp_path / "m.png", queries, images, None, ())
    picture = pixels(tmp_path / "m.png")
    shown = picture[0, 37::72, 37::72].int() // 15
    assert sorted(shown.flatten().tolist()) == [*range(16)]
    left = F.normalize(queries, dim=1)[shown, 0].mean(0)
    assert left.equal(left.sort().values) or left.equal(left.sort(descending=True).values)
    for count, classes, side in ((1, 1, 70), (4, 100, 146)):  # a legend of any length
        linear_eval.draw_map(tmp_path / "l.png", queries[:count], images[:count],
                             torch.arange(count) % classes, ["a class of a long name"] * classes)
        height = side + 14 * math.ceil(classes / 6)
        assert pixels(tmp_path / "l.png").shape == (3, height, side)


def test_pictures_of_a_run_and_of_unlabelled_images(run, folder, tmp_path, capsys):
    flags = {"--neighbours": "n.png", "--map": "m.png", "--export": "b.pth"}
    paths = [tmp_path / name for name in flags.values()]
    pictures = [word for pair in zip(flags, paths) for word in pair] + ["--out", tmp_path]
    judge(run(), "--epochs", 1, *pictures)
    assert default_loader(str(paths[0])).size == (11 * 72 + 2, 10 * 72 + 2)
    assert default_loader(str(paths[1])).size == (3 * 72 + 2, 3 * 72 + 2 + 14)  # 9 of 12, a legend
    for path in paths:
        path.unlink()
    flat = [run(), "--data-dir", folder / "train/dark", "--cache-dir", tmp_path]
    assert judge(*flat, *pictures) == {}
    assert "no accuracies, because there are no labels" in capsys.readouterr().out
    assert all(path.exists() for path in paths)
    for mode in ("finetune", "scratch", "distill"):  # would export what was never trained
        argv = [*flat, "--mode", mode, "--out", tmp_path]
        refuses(capsys, argv, "needs images in class folders")


# ------------------------------------------------------------------------------ results
def test_no_result_is_ever_replaced(tmp_path, capsys):
    """Neither one of other arguments, nor of another checkpoint of the name, nor a broken file."""
    (tmp_path / "eval_c_linear_birds.json").write_text("{")

    def write(number, checkpoint, data, *flags):
        args = linear_eval.parse_args([checkpoint, *flags])
        record = {"data": data, "args": vars(args), "top1": number}
        linear_eval.write_results(args, Path(checkpoint), tmp_path, record)
        path = capsys.readouterr().out.removeprefix("wrote ").strip()
        assert json.loads(Path(path).read_text()) == record
        return Path(path).stem

    calls = {
        "eval_a_linear_birds": ("a.pt", "birds"),
        "eval_a_linear_birds_2": ("a.pt", "birds", "--augment", "--lr", "0.1"),
        "eval_a_linear_birds_3": ("a.pt", "birds", "--mean", "0", "0.5", "1"),
        "eval_a_linear_birds_4": ("other/a.pt", "birds"),
        "eval_a_finetune_birds": ("a.pt", "birds", "--mode", "finetune"),
        "eval_a_linear_flowers": ("a.pt", "flowers"),
        "eval_b_linear_birds": ("b.pt", "birds"),
        "eval_b_linear_birds_2": ("b.pt", "birds"),
        "eval_c_linear_birds_2": ("c.pt", "birds")}
    for number, (name, call) in enumerate(calls.items()):
        assert write(number, *call) == name
    assert {path.stem for path in tmp_path.iterdir()} == {*calls, "eval_c_linear_birds"}


def test_results_of_two_runs_that_are_named_alike_from_their_folders_are_both_kept(
        run, tmp_path, monkeypatch):
    """In either folder the checkpoint is checkpoint.pt; the results go to a common folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(run(), tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        judge("checkpoint.pt", "--out", tmp_path / "out", "--epochs", 1, "--knn")
    assert len([*(tmp_path / "out").iterdir()]) == 2


def test_too_few_images_to_hold_some_out_end_in_one_line(run, folder, tmp_path, capsys):
    """One image a class: there is none to train on, or none to test on."""
    for name in ("dark", "light"):
        (tmp_path / "two" / name).mkdir(parents=True)
        shutil.copy(folder / "train" / name / "0.png", tmp_path / "two" / name)
    refuses(capsys, [run(), "--data-dir", tmp_path / "two", "--out", tmp_path])


@pytest.mark.parametrize("flag", ["--export", "--map", "--neighbours"])
def test_outputs_that_would_replace_something_are_refused_before_the_work(
        flag, run, tmp_path, capsys, monkeypatch):
    """A folder, CHECKPOINT itself, also by a link, and a folder that does not exist."""
    monkeypatch.setattr(linear_eval, "load_dataset", lambda *args: pytest.fail("read data"))
    path = tmp_path / "checkpoint.pt"
    shutil.copy(run(), path)
    (tmp_path / "link.pt").symlink_to(path)
    argv = ["--mode", "finetune", flag]
    for checkpoint, output in (
            (path, tmp_path), (path, path), (path, tmp_path / "link.pt"),
            (tmp_path, path), (tmp_path / "link.pt", path)):
        refuses(capsys, [checkpoint, *argv, output], str(output), "name another file")
    absent = tmp_path / "no" / "x.png"
    refuses(capsys, [path, *argv, absent], "No such file or directory", "no")
    refuses(capsys, [path, *argv, ""], flag, "empty")
    assert path.read_bytes() == run().read_bytes()
    assert not [*tmp_path.glob("*.json")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder root cannot write to")
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr(linear_eval, "load_dataset", lambda *args: pytest.fail("read data"))
    for flags in (["--out", "/proc/self"], ["--export", "/proc/self/b.pth"]):
        refuses(capsys, [run(), *flags], "/proc/self")


def test_results_are_written_before_an_export_that_fails(run, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    path = tmp_path / "b.pth"
    with pytest.raises(SystemExit, match="2"):
        judge(run(), "--epochs", 1, "--out", tmp_path, "--export", path)
    said = capsys.readouterr()
    assert "top1=" in said.out and said.err.count("\n") == 1
    assert "No space left on device" in said.err and not path.exists()
    assert read_result(tmp_path)["top1"] > 10


def test_results_outlive_a_standard_output_that_is_closed(run, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError
    monkeypatch.setattr(sys, "stdout", Closed())
    end = judge(run(), "--mode", "finetune", "--epochs", 2, "--out", tmp_path)
    assert read_result(tmp_path)["top1"] == end["top1"]


def test_a_stop_is_quiet(run, tmp_path):
    """Ctrl-C in a program of its own, in the middle of training."""
    argv = [sys.executable, ROOT / "linear_eval.py", run(), "--mode", "finetune",
            "--epochs", str(10**6), "--out", tmp_path, "--device", "cpu"]
    started = subprocess.Popen(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        begun = any(line.startswith("finetune epoch=1 ") for line in started.stdout)
        started.send_signal(signal.SIGINT)
        assert begun and started.wait(60) == -signal.SIGINT and started.stderr.read() == ""
    finally:
        started.kill()
        started.communicate()
    assert not [*tmp_path.iterdir()]
