"""linear_eval.py: what it trains and leaves alone, its accuracies, foreign weights, exports and pictures."""

import ast
import json
import math
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchvision.datasets.folder import default_loader

import common
import linear_eval
import simsiam
from conftest import OWN, ROOT, SCRIPTS
from test_training import refused


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """A function: the checkpoint of a one-epoch run of a method on the small folder."""
    made = {}

    def make(name="simsiam"):
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            __import__(name).main(["--dataset", "folder", "--data-dir", str(folder), "--image-size", "16", "--width", "0.25",
                                   "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--out", str(out), *OWN.get(name, [])])
            made[name] = out / "checkpoint.pt"
        return str(made[name])
    yield make
    for checkpoint in made.values():
        shutil.rmtree(checkpoint.parent)


def judge(*argv):
    return linear_eval.main([*map(str, argv), "--device", "cpu"])


def fitted(bank, labels, queries, truth, classes):
    """Test accuracy of a logistic regression by L-BFGS, with scikit-learn's default penalty (C = 1)."""
    mean, std = bank.double().mean(0), bank.double().std(0)
    x, q = ((part - mean) / std.where(std > 0, 1) for part in (bank.double(), queries.double()))
    weight = torch.zeros(x.shape[1] + 1, classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight[:-1] + weight[-1], labels) + weight[:-1].square().sum() / (2 * len(x))
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
        assert before.keys() == after.keys() and all(before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("mode", ["finetune", "scratch"])
def test_the_other_modes_train_the_backbone(mode, run, tmp_path):
    before = torch.load(run(), weights_only=True)["backbone"]
    judge(run(), "--mode", mode, "--epochs", 1, "--export", tmp_path / "b.pth", "--out", tmp_path)
    after = torch.load(tmp_path / "b.pth", weights_only=True)
    assert all(not before[key].equal(after[key]) for key in before)
    distance = (before["conv1.weight"] - after["conv1.weight"]).norm() / before["conv1.weight"].norm()
    assert distance < 0.5 if mode == "finetune" else distance > 1  # two random draws are sqrt(2) apart


def test_separable_classes_are_told_apart(run, tmp_path):
    """Dark and light images: any backbone, any mode."""
    for mode in ("linear", "finetune", "scratch"):
        end = judge(run(), "--mode", mode, "--epochs", 20, "--out", tmp_path, "--knn", 1, 5)
        assert end["top1"] == 100 and end["top5"] == 100 and end["knn1"] == 100, mode
        kept = json.loads((tmp_path / f"eval_{mode}.json").read_text())
        assert {key: kept[key] for key in end} == end
        assert (kept["method"], kept["epoch"], kept["labels"], kept["test_images"], kept["features"]) == ("simsiam", 1, 40, 12, 128)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_linear_is_within_half_a_point_of_lbfgs(scale, tmp_path):
    """Features of an untrained network on shapes, whatever their scale, with the defaults."""
    images, labels = common.draw_shapes(6000, 16)
    torch.manual_seed(0)
    f = common.resnet(width=0.25)
    x = scale * linear_eval.features(f, images, torch.full((3,), 0.5), torch.full((3,), 0.2), 500, torch.no_grad)
    bank, queries, keep = x[:4000], x[4000:], torch.arange(4000)
    data = common.Dataset(images[:4000], labels[:4000], images[4000:], labels[4000:], common.SHAPES, None, None)
    ours = linear_eval.classify(torch.nn.Identity(), bank, queries, keep, data, linear_eval.parse_args(["x"]), None)
    theirs = fitted(bank, labels[:4000], queries, labels[4000:], 10)
    assert abs(ours["top1"] - theirs) < 0.5
    assert ours["top5"] > ours["top1"] > 25


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_channel_that_training_never_sees_has_no_effect(mode, monkeypatch):
    """Zero in all of training, not in the test: the batch norm makes it huge, the classifier must not have heard of it."""
    images = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)
    images[20:, 0] = 200
    test = images[10:30].clone()
    test[::2, 2] = 1
    labels = (torch.arange(40) >= 20).long()
    data = common.Dataset(images, labels, test, labels[10:30], ("a", "b"), torch.zeros(3), torch.ones(3))
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    args = linear_eval.parse_args(["x", "--mode", mode, "--epochs", "20"])
    bank, queries = (network(x.float() / 255) for x in (images, test))
    torch.manual_seed(0)
    end = linear_eval.classify(network, bank, queries, torch.arange(40), data, args, partial(torch.autocast, "cpu", enabled=False))
    assert end["top1"] == 100


def test_top1_and_top5_are_counted_by_hand(monkeypatch):
    """A classifier of known scores: right first 3 times in 6, among the first five 5 times."""
    scores = torch.tensor([[9, 1, 2, 3, 4, 5, 0.0]] * 6)
    data = common.Dataset(None, torch.zeros(8, dtype=torch.long), None, torch.tensor([0, 0, 0, 5, 3, 6]), tuple("abcdefg"), None, None)
    monkeypatch.setattr(torch.nn, "Sequential", lambda *a: torch.nn.Identity())
    monkeypatch.setattr(linear_eval, "fit", lambda *a: None)
    end = linear_eval.classify(None, torch.zeros(8, 7), scores, torch.arange(8), data, linear_eval.parse_args(["x"]), None)
    assert end == {"top1": 50.0, "top5": 500 / 6}


def test_few_labels_are_balanced_seeded_and_enough():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    keep = linear_eval.few_labels(labels, 0.1, 0)
    assert labels[keep].bincount().tolist() == [10, 5, 1] and len(keep.unique()) == 16
    assert keep.equal(linear_eval.few_labels(labels, 0.1, 0)) and not keep.equal(linear_eval.few_labels(labels, 0.1, 1))
    assert linear_eval.few_labels(labels, 1.0, 0).sort().values.equal(torch.arange(153))


def test_hidden_labels_are_not_read(run, folder, tmp_path, monkeypatch):
    """The same result when every hidden label is wrong."""
    ends, load = [], common.load_dataset
    for spoil in (False, True):
        def loaded(*args):
            data = load(*args)
            keep = linear_eval.few_labels(data.train_labels, 0.2, 0)
            wrong = 1 - data.train_labels
            wrong[keep] = data.train_labels[keep]
            return data._replace(train_labels=wrong) if spoil else data
        monkeypatch.setattr(linear_eval, "load_dataset", loaded)
        monkeypatch.setattr(linear_eval, "few_labels", lambda labels, share, seed, keep=linear_eval.few_labels(
            load("folder", folder, 16).train_labels, 0.2, 0): keep)
        ends.append([judge(run(), "--label-fraction", 0.2, "--epochs", 3, "--mode", mode, "--out", tmp_path)
                     for mode in ("linear", "finetune")])
    assert ends[0] == ends[1]


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    ends = [judge(run(), "--mode", "finetune", "--epochs", 2, "--lr", "1e-4", "--out", tmp_path) for _ in range(2)]
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
    assert json.loads((tmp_path / "eval_linear_head1.json").read_text())["features"] == 2048
    refused(capsys, linear_eval, [run(), "--head-layers", "3"], "2 layers")
    refused(capsys, linear_eval, [run(), "--head-layers", "1", "--mode", "scratch"], "--head-layers")
    refused(capsys, linear_eval, [run(), "--lr", "1"], "--augment")


def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, linear_eval, ["x"], "torchrun")


# ------------------------------------------------------------------------------ foreign weights
@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "module.encoder."])
def test_foreign_weights_are_all_used(prefix, resnet18, tmp_path):
    """A plain state dict, and the official MoCo's and SimSiam's form with other modules beside the encoder."""
    weights = {prefix + key: x for key, x in resnet18.items()}
    if prefix:
        weights = {"state_dict": {**weights, "module.queue": torch.zeros(3), "module.encoder_k.conv1.weight": torch.zeros(1)}, "epoch": 3}
    torch.save(weights, tmp_path / "w.pth")
    kept, saved = linear_eval.read_weights(tmp_path / "w.pth", prefix)
    assert saved == {} and len(kept) == len(resnet18) - 2
    f = linear_eval.load_backbone(kept, "resnet18", 1.0, "imagenet")
    assert all(x.equal(resnet18[key]) for key, x in f.state_dict().items())
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(resnet18)
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(f.eval()(x), theirs.eval()(x), atol=1e-4)


def test_wide_weights(tmp_path):
    """SimCLR's 2x: every channel count doubled."""
    weights = common.resnet("resnet50", 2.0, "imagenet").state_dict()
    assert weights["layer4.2.conv3.weight"].shape == (4096, 1024, 1, 1)
    assert linear_eval.load_backbone(weights, "resnet50", 2.0, "imagenet").num_features == 4096


def test_foreign_weights_run_with_imagenet_statistics(resnet18, folder, tmp_path):
    torch.save(resnet18, tmp_path / "w.pth")
    end = judge(tmp_path / "w.pth", "--dataset", "folder", "--data-dir", folder, "--image-size", 32, "--epochs", 5)
    assert end["top1"] == 100 and (tmp_path / "eval_w_linear_folder.json").exists()


def test_weights_that_do_not_fit_are_refused_and_listed(resnet18, run, tmp_path, capsys):
    def with_weights(weights, *more):
        torch.save(weights, tmp_path / "w.pth")
        return [str(tmp_path / "w.pth"), "--dataset", "shapes", *more]
    lacking = {key: x for key, x in resnet18.items() if key != "layer3.0.conv2.weight"}
    refused(capsys, linear_eval, with_weights(lacking), 'Missing key(s) in state_dict: "layer3.0.conv2.weight"')
    refused(capsys, linear_eval, with_weights({**resnet18, "layer5.w": torch.zeros(1)}), 'Unexpected key(s) in state_dict: "layer5.w"')
    refused(capsys, linear_eval, with_weights(resnet18, "--width", "2"), "size mismatch for conv1.weight")
    refused(capsys, linear_eval, with_weights(resnet18, "--arch", "resnet50"), 'Missing key(s) in state_dict: "layer1.0.conv3.weight"')
    refused(capsys, linear_eval, with_weights(resnet18, "--stem", "cifar"), "conv1.weight")
    refused(capsys, linear_eval, with_weights({"module.encoder_q." + key: x for key, x in resnet18.items()}), "module.encoder_q.conv1.weight", "--prefix")
    refused(capsys, linear_eval, with_weights(resnet18, "--prefix", "module."), "no weights module.conv1.weight")
    refused(capsys, linear_eval, with_weights({"fc.weight": torch.zeros(1)}), "no ResNet")
    refused(capsys, linear_eval, with_weights({"conv1.weight": 3}), "no state dict")
    refused(capsys, linear_eval, with_weights(torch.zeros(3)), "no state dict")
    refused(capsys, linear_eval, with_weights({0: torch.zeros(3)}), "no state dict")
    refused(capsys, linear_eval, with_weights({"backbone": resnet18, "model": 3, "args": {}}), "no state dict")
    refused(capsys, linear_eval, with_weights({"conv1.weight": torch.zeros(())}), 'Missing key(s) in state_dict: "bn1.weight"', "...")
    refused(capsys, linear_eval, with_weights(resnet18, "--head-layers", "1"), "0 layers")
    (tmp_path / "text.pth").write_text("not weights")
    refused(capsys, linear_eval, [str(tmp_path / "text.pth")], "is not a file of weights")
    refused(capsys, linear_eval, [str(tmp_path / "none.pth")], "no checkpoint")
    assert not [*tmp_path.glob("*.json")]


def test_old_weights_without_batch_counts(resnet18):
    old = {key: x for key, x in resnet18.items() if "num_batches" not in key and not key.startswith("fc.")}
    f = linear_eval.load_backbone(old, "resnet18", 1.0, "imagenet")
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
def test_an_export_is_a_torchvision_resnet_and_a_detector_body(tmp_path, folder):
    """Only fc.* is missing; Faster R-CNN's body takes every weight and runs."""
    torch.save(common.resnet("resnet50", stem="imagenet").state_dict(), tmp_path / "w.pth")
    judge(tmp_path / "w.pth", "--arch", "resnet50", "--dataset", "folder", "--data-dir", folder / "train", "--image-size", 32,
          "--export", tmp_path / "b.pth")
    weights = torch.load(tmp_path / "b.pth", weights_only=True)
    left = torchvision.models.resnet50().load_state_dict(weights, strict=False)
    assert left.missing_keys == ["fc.weight", "fc.bias"] and not left.unexpected_keys
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21)
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
    assert [*ours] == [key for key in torchvision.models.resnet18().state_dict() if not key.startswith("fc.")]


# ------------------------------------------------------------------------------ pictures
def test_neighbours_are_the_nearest_and_framed_by_class(tmp_path):
    """Features on a circle: the ten nearest by angle; images tell which index was drawn."""
    angle = torch.linspace(0, 1, 20)
    bank = torch.stack([angle.cos(), angle.sin()], 1)
    images = (torch.arange(20, dtype=torch.uint8) * 10)[:, None, None, None].expand(20, 3, 64, 64)
    labels = torch.arange(20) // 10
    linear_eval.draw_neighbours(tmp_path / "n.png", bank, images, labels, bank[[0, 19]], images[[0, 19]], labels[[0, 19]])
    picture = torchvision.transforms.functional.pil_to_tensor(default_loader(str(tmp_path / "n.png")))
    cells = [[picture[:, 2 + row * 72:72 + row * 72, 2 + i * 72:72 + i * 72] for i in range(11)] for row in range(2)]
    assert [int(cell[0, 35, 35]) // 10 for cell in cells[0]] == [0, *range(10)]
    assert [int(cell[0, 35, 35]) // 10 for cell in cells[1]] == [19, *range(19, 9, -1)]
    assert all(cell[1, 1, 1] > cell[0, 1, 1] for cell in cells[0][1:])  # all green
    linear_eval.draw_neighbours(tmp_path / "s.png", bank, images, labels, bank, images, labels)
    picture = torchvision.transforms.functional.pil_to_tensor(default_loader(str(tmp_path / "s.png")))
    assert int(picture[0, 37, 72 + 37]) // 10 == 1  # not itself
    cell = picture[:, 2 + 4 * 72:72 + 4 * 72, 2:]  # query 8: its neighbours 10.. are red
    shown = [int(cell[0, 35, 35 + i * 72]) // 10 for i in range(11)]
    assert shown[0] in (8, 9) and {*shown[1:]} == {*range(shown[0] - 5, shown[0] + 6)} - {shown[0]}
    for i, index in enumerate(shown[1:], 1):
        assert (cell[1, 1, 1 + i * 72] > cell[0, 1, 1 + i * 72]) == (index < 10)


def test_the_map_shows_each_image_once_and_in_order(tmp_path):
    """Features on a plane: columns follow the widest axis, rows the other; with colours a class."""
    draw = torch.Generator().manual_seed(0)
    plane = torch.rand(16, 2, generator=draw) * torch.tensor([1.0, 0.1])
    queries = torch.cat([plane, torch.ones(16, 1)], 1)
    images = (torch.arange(16, dtype=torch.uint8) * 15)[:, None, None, None].expand(16, 3, 64, 64)
    linear_eval.draw_map(tmp_path / "m.png", queries, images, None)
    picture = torchvision.transforms.functional.pil_to_tensor(default_loader(str(tmp_path / "m.png")))
    shown = torch.tensor([[int(picture[0, 37 + 72 * row, 37 + 72 * column]) // 15 for column in range(4)] for row in range(4)])
    assert sorted(shown.flatten().tolist()) == [*range(16)]
    left = F.normalize(queries, dim=1)[shown, 0].mean(0)
    assert left.equal(left.sort().values) or left.equal(left.sort(descending=True).values)


def test_pictures_of_a_run_and_of_unlabelled_images(run, folder, tmp_path, capsys):
    pictures = ["--neighbours", tmp_path / "n.png", "--map", tmp_path / "m.png", "--export", tmp_path / "b.pth", "--out", tmp_path]
    judge(run(), "--epochs", 1, *pictures)
    assert default_loader(str(tmp_path / "n.png")).size == (11 * 72 + 2, 10 * 72 + 2)
    assert default_loader(str(tmp_path / "m.png")).size == (3 * 72 + 2, 3 * 72 + 2)  # 9 of 12 test images
    for name in ("n.png", "m.png", "b.pth"):
        (tmp_path / name).unlink()
    assert judge(run(), "--data-dir", folder / "train", *pictures) == {}
    assert capsys.readouterr().out.endswith("no labels: no accuracies\n")
    assert all((tmp_path / name).exists() for name in ("n.png", "m.png", "b.pth"))
    for flag in ("--neighbours", "--map", "--export"):
        refused(capsys, linear_eval, [run(), flag, str(tmp_path / "no/x.png")], "does not exist")
    refused(capsys, linear_eval, [run(), "--map", str(tmp_path / "x.doc")], ".doc")
    refused(capsys, linear_eval, [run(), "--export", str(tmp_path)], "a folder")
    for mode in ("finetune", "scratch"):  # would export what was never trained
        refused(capsys, linear_eval, [run(), "--data-dir", str(folder / "train"), "--mode", mode], "needs labels")


def test_broken_weights_and_a_stop_end_in_one_line(run, tmp_path, capsys, monkeypatch):
    saved = torch.load(run(), weights_only=True)
    saved["backbone"]["conv1.weight"].fill_(math.nan)
    torch.save(saved, tmp_path / "checkpoint.pt")
    refused(capsys, linear_eval, [str(tmp_path / "checkpoint.pt"), "--device", "cpu"], "not finite", status=1)
    monkeypatch.setattr(linear_eval, "features", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    refused(capsys, linear_eval, [run(), "--device", "cpu"], "stopped", status=130)


def test_results_of_different_protocols_stand_side_by_side(run, tmp_path):
    for more in ([], ["--augment"], ["--seed", 7, "--label-fraction", 0.5], ["--dataset", "shapes", "--image-size", 8]):
        judge(run(), "--epochs", 1, "--out", tmp_path, *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eval_linear.json", "eval_linear_0.5_seed7.json", "eval_linear_augment.json", "eval_linear_shapes.json"]


def test_tensorboard(run, tmp_path, capsys, monkeypatch):
    """Without the package: asked for by name. With it: a projector with labels and sprites."""
    monkeypatch.setattr(linear_eval.importlib.util, "find_spec", lambda name: None)
    refused(capsys, linear_eval, [run(), "--tensorboard"], "pip install tensorboard")
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    judge(run(), "--epochs", 1, "--tensorboard", "--out", tmp_path)
    assert (tmp_path / "projector_config.pbtxt").exists() and [*tmp_path.rglob("sprite.png")]


# ------------------------------------------------------------------------------ voice
def test_what_it_shares_with_the_scripts_is_equal():
    """Functions and classes of the same name have the same text."""
    theirs, ours = ({node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
                    for text in ((ROOT / f"{name}.py").read_text() for name in ("simsiam", "linear_eval")))
    both = {"fail", "Parser", "Help", "number", "knn_accuracy"}
    assert both <= theirs.keys() & ours.keys() and all(theirs[name] == ours[name] for name in both)
