"""linear_eval.py: what it trains and leaves alone, foreign weights, results, exports, pictures."""

import argparse
import ast
import copy
import io
import json
import math
import pickle
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchvision.datasets.folder import default_loader

import common
import linear_eval
import moco
import simsiam
from conftest import OWN, ROOT, SCRIPTS, load, refused



@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A function: the checkpoint of a one-epoch run of a method on the small folder."""
    made = {}

    def make(name="simsiam"):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            __import__(name).main([
                "--dataset", "folder", "--data-dir", str(folder), "--image-size", "16",
                "--width", "0.25", "--epochs", "1", "--batch-size", "8", "--device", "cpu",
                "--out", str(out), *OWN.get(name, [])])
            made[name] = out / "checkpoint.pt"
        return str(made[name])
    yield make
    for checkpoint in made.values():
        shutil.rmtree(checkpoint.parent)


def judge(*argv):
    return linear_eval.main([*map(str, argv), "--device", "cpu"])


def the_file(out):
    """The results in a folder that holds one evaluation's."""
    (path,) = Path(out).glob("eval_*.json")
    return json.loads(path.read_text())


def fitted(bank, labels, queries, truth, classes):
    """Test accuracy of a logistic regression by L-BFGS with scikit-learn's penalty (C = 1)."""
    mean, std = bank.double().mean(0), bank.double().std(0)
    x, q = ((part - mean) / std.where(std > 0, 1) for part in (bank.double(), queries.double()))
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], labels)
        loss = loss + weight[:-1].square().sum() / (2 * len(x))
        loss.backward()
        return loss
    optimizer.step(closure)
    return 100 * ((q @ weight[:-1] + weight[-1]).argmax(1) == truth).double().mean().item()


# ------------------------------------------------------------------------------ protocol
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_frozen_backbone_keeps_every_bit(name, run, tmp_path):
    """Parameters and buffers, after a linear evaluation with and without augmentation."""
    before = torch.load(run(name), weights_only=True)["backbone"]
    for more in ([], ["--augment"]):
        judge(run(name), "--epochs", 2, "--export", tmp_path / "b.pth", "--out", tmp_path, *more)
        after = torch.load(tmp_path / "b.pth", weights_only=True)
        assert before.keys() == after.keys()
        assert all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("mode", ["finetune", "scratch"])
def test_the_other_modes_train_the_backbone(mode, run, tmp_path):
    before = torch.load(run(), weights_only=True)["backbone"]
    judge(run(), "--mode", mode, "--epochs", 1, "--export", tmp_path / "b.pth", "--out", tmp_path)
    after = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(not before[key].equal(after[key]) for key in before)
    distance = (before["conv1.weight"] - after["conv1.weight"]).norm()
    distance = distance / before["conv1.weight"].norm()  # of two random draws: sqrt(2)
    assert distance < 0.5 if mode == "finetune" else distance > 1


def test_separable_classes_are_told_apart(run, folder, tmp_path, capsys):
    """Dark and light images: any backbone, any mode. The kNN is of the network before training."""
    networks = {"linear": "pre-trained", "finetune": "pre-trained", "scratch": "random"}
    for mode in ("linear", "finetune", "scratch"):
        end = judge(run(), "--mode", mode, "--epochs", 20, "--out", tmp_path, "--knn", 1, 5)
        assert end["top1"] == 100 and end["top5"] == 100 and end["knn1"] == 100, mode
        kept = json.loads((tmp_path / f"eval_{mode}_{folder.name}.json").read_text())
        assert {key: kept[key] for key in end} == end
        assert (kept["method"], kept["epoch"], kept["labels"]) == ("simsiam", 1, 40)
        assert (kept["test_images"], kept["features"]) == (12, 128)
        assert kept["networks"] == {"top1": mode, "knn": f"{networks[mode]} backbone"}
        said = capsys.readouterr().out
        assert f"{mode}: top1=100.00 " in said and f"knn_tau=0.1 ({networks[mode]} " in said


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_linear_is_within_half_a_point_of_lbfgs(scale, tmp_path):
    """Features of an untrained network on shapes, whatever their scale, with the defaults."""
    images, labels = common.draw_shapes(6000, 16)
    torch.manual_seed(0)
    f = common.resnet(width=0.25)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.2)
    x = scale * linear_eval.features(f, images, mean, std, 500, torch.no_grad)
    bank, queries, keep = x[:4000], x[4000:], torch.arange(4000)
    data = common.Dataset(images[:4000], labels[:4000], images[4000:], labels[4000:],
                          common.SHAPES, None, None)
    ours, _ = linear_eval.classify(torch.nn.Identity(), bank, queries, keep, data,
                                   linear_eval.parse_args(["x"]), None)
    theirs = fitted(bank, labels[:4000], queries, labels[4000:], 10)
    assert abs(ours["top1"] - theirs) < 0.5
    assert ours["top5"] > ours["top1"] > 25


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_channel_that_training_never_sees_has_no_effect(mode, monkeypatch):
    """Zero in training, not in the test, where batch norm makes it huge: it must have no weight."""
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    images[20:, 0] = 200
    test = images[10:30].clone()
    test[::2, 2] = 1
    labels = (torch.arange(40) >= 20).long()
    data = common.Dataset(images, labels, test, labels[10:30], ("a", "b"), torch.zeros(3),
                          torch.ones(3))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    args = linear_eval.parse_args(["x", "--mode", mode, "--epochs", "20"])
    bank, queries = (network(x.float() / 255) for x in (images, test))
    torch.manual_seed(0)
    end, _ = linear_eval.classify(network, bank, queries, torch.arange(40), data, args,
                                  partial(torch.autocast, "cpu", enabled=False))
    assert end["top1"] == 100


def red_or_not():
    """Images of two classes, more or less red, and a small network with a ReLU at its end."""
    torch.manual_seed(0)
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    labels = (images[:, 0].float().mean((1, 2)) > 127.5).long()
    data = common.Dataset(images, labels, images, labels, ("a", "b"), torch.full((3,), 0.5),
                          torch.full((3,), 0.3))
    return data, torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                     torch.nn.Linear(3, 8), torch.nn.ReLU())


def test_a_nearly_dead_channel_does_not_wreck_what_is_trained():
    """A ReLU's output of tiny spread, as projectors have: its weights move as the others' do."""
    data, network = red_or_not()
    with torch.no_grad():
        network[2].weight[0] *= 1e-5
        network[2].bias[0] = 0
        before = network[2].weight.clone()
    args = linear_eval.parse_args(["x", "--mode", "finetune", "--epochs", "3"])
    linear_eval.classify(network, torch.zeros(64, 8), None, torch.arange(64), data, args,
                         partial(torch.autocast, "cpu", enabled=False))
    moved = (network[2].weight - before).detach().norm(dim=1)
    assert moved[1:].max() > 1e-4 and moved[0] < 3 * moved[1:].max()


def test_accuracies_are_counted_by_hand(monkeypatch):
    """A classifier of known scores: right first 3 times in 6, all of class 0, of four classes."""
    scores = torch.tensor([[9, 1, 2, 3, 4, 5, 0.0]] * 6)
    data = common.Dataset(None, torch.zeros(8, dtype=torch.long), None,
                          torch.tensor([0, 0, 0, 5, 3, 6]), tuple("abcdefg"), None, None)
    monkeypatch.setattr(torch.nn, "Sequential", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(linear_eval, "fit", lambda *a: None)
    end, _ = linear_eval.classify(None, torch.zeros(8, 7), scores, torch.arange(8), data,
                                  linear_eval.parse_args(["x"]), None)
    assert end == {"top1": 50.0, "balanced": 25.0, "top5": 500 / 6}


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
    data = data._replace(train_labels=None)
    head, students = torch.nn.Linear(3, 2, bias=False), []
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-1e6] * 3, [1e6] * 3]))
    for tau in ("0.1", "1"):
        args = linear_eval.parse_args(["x", "--mode", "distill", "--epochs", "3",
                                       "--distill-tau", tau])
        students.append(copy.deepcopy(network))
        linear_eval.classify(students[-1], torch.zeros(64, 8), None, torch.arange(64), data, args,
                             partial(torch.autocast, "cpu", enabled=False), (network[:2], head))
    low, high = (student[2].weight.detach() for student in students)
    assert torch.allclose(low, high, atol=1e-6) and (low - network[2].weight).norm() > 1e-3


def test_distillation_begins_with_fine_tuning(run, tmp_path, capsys):
    """The teacher is --mode finetune's network, to the bit, whatever the student's flags are."""
    flags = ["--label-fraction", 0.2, "--out", tmp_path]
    taught = judge(run(), "--mode", "finetune", *flags)
    both = judge(run(), "--mode", "distill", *flags, "--epochs", 2, "--lr", 0.01)
    assert {key: both[f"teacher_{key}"] for key in ("top1", "balanced", "top5")} == {
        key: taught[key] for key in ("top1", "balanced", "top5")}
    said = capsys.readouterr().out
    assert f"distill: top1={both['top1']:.2f} " in said
    assert f" teacher_top1={both['teacher_top1']:.2f} " in said
    kept = json.loads((tmp_path / "eval_distill_images0_0.2.json").read_text())
    assert {key: kept[key] for key in both} == both and kept["labels"] == 8


def test_the_student_sees_all_images_and_leaves_its_teacher_alone(run, tmp_path, monkeypatch):
    """In main: 8 images with labels teach the teacher, all 40 the student, which is exported."""
    calls, taus, train, loss = [], [], linear_eval.train, linear_eval.distill_loss

    def spied(network, head, keep, data, args, recipe, autocast, teacher):
        before = [{key: x.clone() for key, x in part.state_dict().items()}
                  for part in teacher or ()]
        assert not any(m.training for part in teacher or () for m in part.modules())
        train(network, head, keep, data, args, recipe, autocast, teacher)
        for part, old in zip(teacher or (), before):  # batch norms' statistics too
            assert all(x.equal(old[key]) for key, x in part.state_dict().items())
        calls.append((network, keep))
    monkeypatch.setattr(linear_eval, "train", spied)
    monkeypatch.setattr(linear_eval, "distill_loss",
                        lambda s, t, tau: taus.append(tau) or loss(s, t, tau))
    judge(run(), "--mode", "distill", "--label-fraction", 0.2, "--epochs", 1, "--distill-tau", 2,
          "--export", tmp_path / "b.pth", "--out", tmp_path)
    (teacher, few), (student, everything) = calls
    assert len(few) == 8 and sorted(everything.tolist()) == [*range(40)] and {*taus} == {2.0}
    assert teacher is not student
    kept = torch.load(tmp_path / "b.pth")
    assert all(x.equal(kept[key]) for key, x in student[0].state_dict().items())


def test_a_student_learns_all_images_from_its_teacher_alone(run, tmp_path):
    """The teacher knows the classes by their colour and keeps every bit; labels are not there."""
    images = torch.randint(100, (60, 3, 8, 8), dtype=torch.uint8)
    images[30:] += 120
    truth = (torch.arange(60) >= 30).long()
    data = common.Dataset(images, None, images, truth, ("dark", "light"), torch.full((3,), 0.4),
                          torch.full((3,), 0.3))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    student = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                  torch.nn.Linear(3, 4))
    head = torch.nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-9.0] * 3, [9.0] * 3]))
        head.bias.zero_()
    norm = torch.nn.BatchNorm1d(3, affine=False)  # would move if it were trained
    teacher = (network.eval(), torch.nn.Sequential(norm, head).eval())
    before = {key: x.clone() for key, x in teacher[1].state_dict().items()}
    seen = {"teacher": [], "student": []}
    teacher[0][0].register_forward_hook(lambda m, x, y: seen["teacher"].append(x[0].clone()))
    student[0].register_forward_hook(lambda m, x, y: seen["student"].append(x[0].clone()))
    args = linear_eval.parse_args(["x", "--mode", "distill", "--epochs", "40", "--lr", "1"])
    end, _ = linear_eval.classify(student, torch.zeros(60, 4), None, torch.arange(60), data, args,
                                  partial(torch.autocast, "cpu", enabled=False), teacher)
    assert end["top1"] == 100
    assert all(x.equal(before[key]) for key, x in teacher[1].state_dict().items())
    assert all(x.grad is None for x in teacher[1].parameters())
    assert len(seen["teacher"]) == 40 * 7  # batches of 8
    assert all(x.equal(y) for x, y in zip(seen["teacher"], seen["student"]))  # the same views


# ------------------------------------------------------------------------------ labels and seeds
def test_few_labels_are_balanced_seeded_and_enough():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    keep = linear_eval.few_labels(labels, 0.1, 0)
    assert labels[keep].bincount().tolist() == [10, 5, 1] and len(keep.unique()) == 16
    assert keep.equal(linear_eval.few_labels(labels, 0.1, 0))
    assert not keep.equal(linear_eval.few_labels(labels, 0.1, 1))
    assert linear_eval.few_labels(labels, 1.0, 0).sort().values.equal(torch.arange(153))


def test_hidden_labels_are_not_read(run, folder, tmp_path, monkeypatch):
    """The same result when every hidden label is wrong."""
    ends, load, few_labels = [], common.load_dataset, linear_eval.few_labels
    for spoil in (False, True):
        def loaded(*args):
            data = load(*args)
            keep = few_labels(data.train_labels, 0.2, 0)
            wrong = 1 - data.train_labels
            wrong[keep] = data.train_labels[keep]
            return data._replace(train_labels=wrong) if spoil else data
        monkeypatch.setattr(linear_eval, "load_dataset", loaded)
        keep = few_labels(load("folder", folder, 16).train_labels, 0.2, 0)
        monkeypatch.setattr(linear_eval, "few_labels", lambda *a, keep=keep: keep)
        ends.append([judge(run(), "--label-fraction", 0.2, "--epochs", 3, "--mode", mode,
                           "--out", tmp_path) for mode in ("linear", "finetune", "distill")])
    assert ends[0] == ends[1]


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    ends = [judge(run(), "--mode", "finetune", "--epochs", 2, "--lr", "1e-4", "--out", tmp_path)
            for _ in range(2)]
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------ heads
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_deeper_cut_is_the_projector(name, run):
    """All layers kept: the projector's own output; fewer: what enters its next linear layer."""
    module = __import__(name)
    saved = torch.load(run(name), weights_only=True)
    args = module.parse_args(["--batch-size", "8", *OWN.get(name, [])])
    args.__dict__.update(saved["args"])
    model = module.Model(lambda: common.resnet(width=0.25), args)
    model.load_state_dict(saved["model"])
    g = model.g.eval()
    x = torch.randn(5, 128)
    whole = linear_eval.load_head(saved, 2).eval()
    assert torch.allclose(whole(x), g(x)) and len(linear_eval.load_head(saved, 0)) == 0
    last = max(i for i, layer in enumerate(g) if isinstance(layer, torch.nn.Linear))
    assert torch.allclose(linear_eval.load_head(saved, 1).eval()(x), g[:last](x))
    with pytest.raises(ValueError, match="--head-layers 3.*has 2 layers"):
        linear_eval.load_head(saved, 3)


def test_a_deeper_cut_is_judged(run, tmp_path, capsys):
    judge(run(), "--head-layers", 1, "--epochs", 1, "--out", tmp_path)
    assert the_file(tmp_path)["features"] == 2048
    refused(capsys, linear_eval, [run(), "--head-layers", "3"], "2 layers")
    scratch = [run(), "--head-layers", "1", "--mode", "scratch"]
    refused(capsys, linear_eval, scratch, "--head-layers")
    refused(capsys, linear_eval, [run(), "--lr", "1"], "--augment")


def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, linear_eval, ["x"], "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "")  # as some schedulers leave it
    refused(capsys, linear_eval, ["none.pt"], "none.pt")


# ------------------------------------------------------------------------------ foreign weights
@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def sequential(weights, start=3):
    """The names that an nn.Sequential of a ResNet's modules gives them, layer1 at start."""
    modules = {"conv1": "0", "bn1": "1", **{f"layer{i}": f"{start + i - 1}" for i in range(1, 5)}}
    parts = {key: key.partition(".") for key in weights}
    return {".".join([modules.get(first, first), rest]): weights[key]
            for key, (first, _, rest) in parts.items() if first != "fc"}


def forms(plain):
    """What projects save: the file's content, the --prefix that is needed, what is left out."""
    def under(name, weights):
        return {name + key: x for key, x in weights.items()}
    head, other = {"projection_head.0.weight": torch.zeros(2, 3)}, torch.zeros(64, 3, 7, 7)
    return {
        "torchvision": (plain, "", ""),
        "moco": ({"state_dict": {**under("module.encoder_q.", plain), "module.queue": other[0, 0],
                                 "module.encoder_k.conv1.weight": other}, "epoch": 3},
                 "module.encoder_q.", ""),
        "simsiam": ({"state_dict": under("module.encoder.", plain)}, "module.encoder.", ""),
        "one backbone": ({"state_dict": under("module.encoder.", plain)}, "", ""),
        "supcon": ({"opt": 1, "model": under("encoder.", plain), "epoch": 3}, "", ""),
        "dino": ({"student": under("module.backbone.", {"conv1.weight": other}),
                  "teacher": {**under("backbone.", plain), **head}}, "teacher.backbone.", ""),
        "swav": (under("module.", {**plain, **head, "prototypes.weight": other}), "",
                 "projection_head, prototypes"),
        "half of ours": ({"backbone": plain, "model": 3, "args": {}}, "", ""),
        "lightly": (under("backbone.", sequential(plain, 4)) | head, "", ""),
        "leftthomas": (under("f.", sequential(plain)) | under("g.", sequential(head)), "", "")}


@pytest.mark.parametrize("form", forms({}))
def test_foreign_weights_are_all_used(form, resnet18, tmp_path, capsys):
    """Dicts within dicts, Sequential's numbers, heads inside the network."""
    saved, prefix, left_out = forms(resnet18)[form]
    torch.save(saved, tmp_path / "w.pth")
    kept, ours = linear_eval.read_weights(tmp_path / "w.pth", prefix)
    assert ours == {} and len(kept) == len(resnet18) - 2
    f = common.resnet("resnet18", 1.0, "imagenet")
    common.load_backbone(f, kept)
    assert all(x.equal(resnet18[key]) for key, x in f.state_dict().items())
    assert capsys.readouterr().err == (
        f"left out, as no ResNet has it: {left_out}\n" if left_out else "")


def test_a_loaded_backbone_is_torchvisions_without_its_head(resnet18):
    f = common.resnet("resnet18", 1.0, "imagenet")
    f.load_state_dict({key: x for key, x in resnet18.items() if not key.startswith("fc.")})
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(resnet18)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(f.eval()(x), theirs.eval()(x), atol=1e-4)


@pytest.mark.parametrize("what, words", {
    "Namespace": (argparse.Namespace(lr=1), ["argparse.Namespace", "torch.save its weights"]),
    "scalar": (np.float64(0.5), ["numpy", "scalar"])}.values())
def test_what_the_safe_loader_met_is_named(what, words, resnet18, tmp_path, capsys):
    torch.save({"state_dict": resnet18, "best": what}, tmp_path / "w.pth")
    refused(capsys, linear_eval, [str(tmp_path / "w.pth")], "not a file of weights", *words)


@pytest.mark.parametrize("content, word", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ((66).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[1]}}', "safetensors"),
    (b"", "EOFError"), (b"<html>", "not a file of weights")])
def test_files_of_other_kinds_are_named(content, word, tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(content)
    refused(capsys, linear_eval, [str(tmp_path / "w.pth")], word)


def test_the_width_of_foreign_weights_is_read_off_them(folder, tmp_path, capsys):
    """As SimCLR's 2x, every channel count doubled; here a quarter."""
    weights = common.resnet("resnet50", 2.0, "imagenet").state_dict()
    assert weights["layer4.2.conv3.weight"].shape == (4096, 1024, 1, 1)
    torch.save(common.resnet("resnet18", 0.25, "imagenet").state_dict(), tmp_path / "w.pth")
    judge(tmp_path / "w.pth", "--dataset", "folder", "--data-dir", folder, "--image-size", 32,
          "--export", tmp_path / "b.pth")
    assert "resnet('resnet18', 0.25, 'imagenet')" in capsys.readouterr().err
    torch.save(common.resnet("resnet18", 0.3, "imagenet").state_dict(), tmp_path / "w.pth")
    judge(tmp_path / "w.pth", "--dataset", "folder", "--data-dir", folder, "--image-size", 32)


def test_foreign_weights_run_with_imagenet_statistics(resnet18, folder, tmp_path):
    torch.save(resnet18, tmp_path / "w.pth")
    end = judge(tmp_path / "w.pth", "--dataset", "folder", "--data-dir", folder,
                "--image-size", 32, "--epochs", 5)
    assert end["top1"] == 100 and (tmp_path / f"eval_w_linear_{folder.name}.json").exists()


def test_weights_that_do_not_fit_are_refused_and_listed(resnet18, run, tmp_path, capsys):
    def with_weights(weights, *more):
        torch.save(weights, tmp_path / "w.pth")
        return [str(tmp_path / "w.pth"), "--dataset", "shapes", *more]
    lacking = {key: x for key, x in resnet18.items() if key != "layer3.0.conv2.weight"}
    more = {**resnet18, "layer4.2.conv1.weight": torch.zeros(1)}
    mocos = {f"encoder_{x}.conv1.weight": resnet18["conv1.weight"] for x in "qk"}
    for weights, flags, *words in (
            (lacking, [], 'Missing key(s) in state_dict: "layer3.0.conv2.weight"'),
            (more, [], 'Unexpected key(s) in state_dict: "layer4.2.conv1.weight"'),
            ({**resnet18, "layer1.0.conv1.weight": torch.zeros(9, 64, 3, 3)}, [], "size mismatch"),
            (resnet18, ["--arch", "resnet50"], "layer1.0.conv3.weight"),
            (mocos, [], "2 of 2 ResNets", "encoder_q. encoder_k.", "--prefix"),
            (mocos, ["--prefix", "encoder."], "--prefix 'encoder.' fits 0"),
            ({"fc.weight": torch.zeros(1)}, [], "no ResNet"),
            (torch.zeros(3), [], "not a file of weights"),
            ({"conv1.weight": 3}, [], "no ResNet"), ({0: torch.zeros(3)}, [], "no ResNet"),
            ({"conv1.weight": resnet18["conv1.weight"]}, [], 'Missing key(s) in state_dict: "bn1'),
            (resnet18, ["--head-layers", "1"], "0 layers")):
        refused(capsys, linear_eval, with_weights(weights, *flags), *words)
    refused(capsys, linear_eval, [str(tmp_path / "none.pth")], "none.pth")
    refused(capsys, linear_eval, [str(tmp_path)], str(tmp_path))
    assert not [*tmp_path.glob("*.json")]


def test_a_prefix_chooses_from_our_own_checkpoint_too(whole_runs):
    """MoCo's slow copy; it was the backbone, whatever the prefix."""
    path = whole_runs(moco)[0] / "checkpoint.pt"
    kept, ours = linear_eval.read_weights(path, "f_k.")
    assert ours == {} and kept["conv1.weight"].equal(load(path.parent)["model"]["f_k.conv1.weight"])
    with pytest.raises(ValueError, match="fits 0 of"):
        linear_eval.read_weights(path, "foo.")


def test_old_weights_without_batch_counts(resnet18):
    old = {key: x for key, x in resnet18.items()
           if "num_batches" not in key and not key.startswith("fc.")}
    f = common.resnet("resnet18", 1.0, "imagenet")
    common.load_backbone(f, old)
    assert f.bn1.weight.equal(resnet18["bn1.weight"])


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)
    torch.save({"state_dict": Bomb()}, tmp_path / "w.pth")
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("w.pth", "x.pth"):
        refused(capsys, linear_eval, [str(tmp_path / name)], "not a file of weights")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------ exports
def test_an_export_is_a_torchvision_resnet_and_a_detector_body(tmp_path, folder, capsys):
    """Only fc.* is missing; Faster R-CNN's body takes every weight and runs."""
    torch.save(common.resnet("resnet50", stem="imagenet").state_dict(), tmp_path / "w.pth")
    judge(tmp_path / "w.pth", "--arch", "resnet50", "--dataset", "folder", "--data-dir",
          folder / "train", "--image-size", 32, "--export", tmp_path / "b.pth")
    assert capsys.readouterr().err == ""
    weights = torch.load(tmp_path / "b.pth", weights_only=True)
    left = torchvision.models.resnet50().load_state_dict(weights, strict=False)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=21)
    left = detector.backbone.body.load_state_dict(weights)
    assert not left.missing_keys and not left.unexpected_keys
    assert detector.backbone.body.layer4[2].conv3.weight.equal(weights["layer4.2.conv3.weight"])
    detector.train()
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 64, 64)], [target])
    assert all(math.isfinite(x.item()) for x in losses.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_checkpoints_backbone_has_torchvisions_names(name, run):
    """At width 1 and the ImageNet stem these names are torchvision's ResNet-18 without fc."""
    ours = torch.load(run(name), weights_only=True)["backbone"]
    theirs = torchvision.models.resnet18().state_dict()
    assert [*ours] == [key for key in theirs if not key.startswith("fc.")]


def test_an_export_that_torchvision_cannot_load_says_what_can(run, tmp_path, capsys):
    judge(run(), "--epochs", 1, "--out", tmp_path, "--export", tmp_path / "b.pth")
    said = capsys.readouterr().err
    assert said.startswith("warning: torchvision") and said.count("\n") == 1
    call = said[said.index("resnet('"):]
    eval(call, {"resnet": common.resnet}).load_state_dict(torch.load(tmp_path / "b.pth"))


def test_an_export_is_judged_alike_by_the_mean_and_std_of_its_results(run, folder, tmp_path):
    """As README says: the data and both statistics are typed again, from the JSON."""
    end = judge(run(), "--epochs", 9, "--out", tmp_path, "--export", tmp_path / "b.pth")
    used = the_file(tmp_path)
    typed = [word for key in ("mean", "std") for word in (f"--{key}", *used[key])]
    data = ["--dataset", "folder", "--data-dir", folder, "--image-size", 16, "--epochs", 9]
    again = judge(tmp_path / "b.pth", *data, *typed, "--out", tmp_path / "again")
    assert again == end and the_file(tmp_path / "again")["mean"] == used["mean"]
    assert used["mean"] == torch.load(run(), weights_only=True)["mean"].tolist()


# ------------------------------------------------------------------------------ pictures
def pixels(path):
    return torchvision.transforms.functional.pil_to_tensor(default_loader(str(path)))


def test_neighbours_are_the_nearest_and_framed_by_class(tmp_path):
    """Features on a circle, of any length: the ten nearest by angle; images tell their index."""
    angle = torch.linspace(0, 1, 20)
    bank = torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(1, 9, 20)[:, None]
    images = (torch.arange(20, dtype=torch.uint8) * 10)[:, None, None, None].expand(20, 3, 64, 64)
    labels = torch.arange(20) // 10
    ends = [0, 19]
    linear_eval.draw_neighbours(tmp_path / "n.png", bank, images, labels, bank[ends],
                                images[ends], labels[ends])
    picture = pixels(tmp_path / "n.png")
    cells = [[picture[:, 2 + row * 72:72 + row * 72, 2 + i * 72:72 + i * 72] for i in range(11)]
             for row in range(2)]
    assert [int(cell[0, 35, 35]) // 10 for cell in cells[0]] == [0, *range(10)]
    assert [int(cell[0, 35, 35]) // 10 for cell in cells[1]] == [19, *range(19, 9, -1)]
    assert all(cell[1, 1, 1] > cell[0, 1, 1] for cell in cells[0][1:])  # all green
    linear_eval.draw_neighbours(tmp_path / "s.png", bank, images, labels, bank, images, labels)
    picture = pixels(tmp_path / "s.png")
    assert int(picture[0, 37, 72 + 37]) // 10 == 1  # not itself
    cell = picture[:, 2 + 4 * 72:72 + 4 * 72, 2:]  # query 8: its neighbours 10.. are red
    shown = [int(cell[0, 35, 35 + i * 72]) // 10 for i in range(11)]
    assert shown[0] in (8, 9)
    assert {*shown[1:]} == {*range(shown[0] - 5, shown[0] + 6)} - {shown[0]}
    for i, index in enumerate(shown[1:], 1):
        assert (cell[1, 1, 1 + i * 72] > cell[0, 1, 1 + i * 72]) == (index < 10)


def test_the_map_shows_each_image_once_and_in_order(tmp_path):
    """Features on a plane: columns follow the widest axis, rows the other; with colours a class."""
    draw = torch.Generator().manual_seed(0)
    plane = torch.rand(16, 2, generator=draw) * torch.tensor([1.0, 0.1])
    queries = torch.cat([plane, torch.ones(16, 1)], 1)
    images = (torch.arange(16, dtype=torch.uint8) * 15)[:, None, None, None].expand(16, 3, 64, 64)
    linear_eval.draw_map(tmp_path / "m.png", queries, images, None, ())
    picture = pixels(tmp_path / "m.png")
    shown = torch.tensor([[int(picture[0, 37 + 72 * row, 37 + 72 * column]) // 15
                           for column in range(4)] for row in range(4)])
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
    assert judge(run(), "--data-dir", folder / "train", *pictures) == {}
    assert "no labels in a test/ or val/: no accuracies\n" in capsys.readouterr().out
    assert all(path.exists() for path in paths)
    for flag, path in zip(flags, paths):
        refused(capsys, linear_eval, [run(), flag, str(tmp_path / "no" / path.name)],
                "cannot write", "No such file or directory")
    for mode in ("finetune", "scratch"):  # would export what was never trained
        refused(capsys, linear_eval, [run(), "--data-dir", str(folder / "train"), "--mode", mode],
                "needs labels")


def test_broken_weights_end_in_one_line(run, tmp_path, capsys):
    saved = torch.load(run(), weights_only=True)
    saved["backbone"]["conv1.weight"].fill_(math.nan)
    torch.save(saved, tmp_path / "checkpoint.pt")
    argv = [str(tmp_path / "checkpoint.pt"), "--device", "cpu"]
    refused(capsys, linear_eval, argv, "not finite", status=1)


# ------------------------------------------------------------------------------ results
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder root cannot write to")
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr(linear_eval, "load_dataset", lambda *a: pytest.fail("read data"))
    for flags in (["--out", "/proc/self"], ["--export", "/proc/self/b.pth"]):
        refused(capsys, linear_eval, [run(), *flags], "cannot write to /proc/self")


def test_results_outlive_an_export_that_cannot_be_written(run, tmp_path, capsys):
    """Its name is a folder's."""
    (tmp_path / "b.pth").mkdir()
    with pytest.raises(SystemExit, match="2"):
        judge(run(), "--dataset", "shapes", "--image-size", 8, "--epochs", 1, "--out", tmp_path,
              "--export", tmp_path / "b.pth")
    said = capsys.readouterr()
    assert "top1=" in said.out and f"Is a directory: '{tmp_path}/b.pth'" in said.err
    assert json.loads((tmp_path / "eval_linear_shapes.json").read_text())["top1"] > 10


@pytest.mark.parametrize("failure", [BrokenPipeError, OSError])
def test_results_outlive_a_standard_output_that_fails(failure, run, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise failure()
    monkeypatch.setattr(sys, "stdout", Closed())
    end = judge(run(), "--mode", "finetune", "--epochs", 2, "--out", tmp_path)
    assert the_file(tmp_path)["top1"] == end["top1"]


def program(*argv, **more):
    return subprocess.Popen([sys.executable, *map(str, argv)], text=True, stderr=subprocess.PIPE,
                            **{"stdout": subprocess.PIPE, **more})


def test_a_stop_is_quiet(run, tmp_path):
    """Ctrl-C in a program of its own, in the middle of training."""
    started = program(ROOT / "linear_eval.py", run(), "--mode", "finetune", "--epochs", 10**6,
                      "--out", tmp_path, "--device", "cpu")
    assert any(line.startswith("finetune epoch=1 ") for line in started.stdout)  # reads no further
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == -signal.SIGINT and started.stderr.read() == ""
    assert not [*tmp_path.iterdir()]
    started.communicate()


def test_results_of_different_protocols_stand_side_by_side(run, folder, tmp_path):
    """And those of other images: birds, then flowers."""
    names = [f"eval_linear_{folder.name}", f"eval_linear_augment_{folder.name}",
             f"eval_linear_{folder.name}_0.5_seed7", "eval_linear_shapes"]
    flags = [[], ["--augment"], ["--seed", 7, "--label-fraction", 0.5],
             ["--dataset", "shapes", "--image-size", 8]]
    for birds in ("birds", "flowers"):
        shutil.copytree(folder, tmp_path / birds)
        names.append(f"eval_linear_{birds}")
        flags.append(["--data-dir", tmp_path / birds])
    for more in flags:
        judge(run(), "--epochs", 1, "--out", tmp_path / "out", *more)
    written = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert written == sorted(names)


# ------------------------------------------------------------------------------ voice
def test_what_it_shares_with_the_scripts_is_equal():
    """Functions and classes of the same name have the same text."""
    theirs, ours = ({node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
                    for text in map(Path.read_text, (ROOT / "simsiam.py", ROOT / "linear_eval.py")))
    both = {"fail", "number", "knn_accuracy"}
    assert both <= theirs.keys() & ours.keys() and all(theirs[name] == ours[name] for name in both)
