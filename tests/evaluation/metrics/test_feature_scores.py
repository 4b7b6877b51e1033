"""Scores on features, with towers whose saved weights are random: the paths are real, the figures are not."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from pbe.checkpoints.tower_weights import read_state
from pbe.errors import UserError
from pbe.evaluation.metrics.base import Batch, Score
from pbe.evaluation.metrics.bootstrap import Bootstrap, cosines
from pbe.evaluation.metrics.feature_scores import load_mixture, paper_cosines, quality, raster_crop
from pbe.evaluation.metrics.scoring import METRICS, ScoreSettings, score
from pbe.evaluation.metrics.sets import ImageFolder, frechet_distance, kernel
from pbe.evaluation.metrics.towers import (
    TOWERS,
    LiteTower,
    Tower,
    TowerSpec,
    build_network,
    centre_crop,
    load_tower,
    region,
)
from pbe.files import sha256_of
from tests.checkpoints.test_tower_weights import save_program
from tests.commands import fit as fit_mixture
from tests.evaluation.metrics.test_scoring import by_name, make

SMALL = "vit/32x2-patch56-heads2-mlp64-quickgelu"
FEW = Bootstrap(resamples=50, set_resamples=3)


def random_weights(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network = build_network(TowerSpec(SMALL))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = folder / f"tower{seed}.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return random_weights(tmp_path)


@pytest.fixture
def settings(weights: Path):
    """Settings whose CLIP and DINO are small towers with saved random weights."""

    def make_settings(*metrics: str, **changes: object) -> ScoreSettings:
        towers = {"clip": SMALL, "dino": SMALL}
        files = {"clip": str(weights), "dino": str(random_weights(weights.parent, 1))}
        plain = ScoreSettings(metrics, weights=files, architectures=towers, bootstrap=FEW)
        return replace(plain, **changes)

    return make_settings


def test_raster_crop_of_a_box_leaves_out_its_last_row_and_column():
    mask = np.zeros((10, 12), np.uint8)
    mask[2:7, 3:9] = 255  # rows 2 to 6, columns 3 to 8
    assert raster_crop(mask) == (3, 2, 8, 6)


def test_raster_crop_of_other_shapes_is_the_originals():
    mask = np.zeros((10, 12), np.uint8)
    mask[1, 5] = mask[4, 2] = mask[4, 9] = mask[8, 6] = 255  # a diamond: its sides are lost
    mask[0, 0] = 254  # not white
    assert raster_crop(mask) == (5, 1, 6, 8)
    assert raster_crop(np.zeros((3, 3), np.uint8)) == (0, 0, 0, 0)


def test_papers_region_score_by_hand(weights):
    tower = load_tower("clip", SMALL, str(weights))
    cases, edits = make(3)
    one_row = np.zeros_like(cases[1].mask)
    one_row[5, 3:9] = 255  # first and last pixel are in the same row: the original's crop is empty
    cases[1] = replace(cases[1], mask=one_row)
    values = paper_cosines(tower, Batch([0, 1, 2], cases, edits))
    assert np.isnan(values).tolist() == [False, True, False]
    mean, std = (torch.tensor(x)[:, None, None] for x in (tower.spec.mean, tower.spec.std))
    pixels = (torch.from_numpy(edits[0]).permute(2, 0, 1) / 255 - mean) / std
    cut = F.interpolate(pixels[None, :, 6:17, 5:14], size=(224, 224), mode="bilinear", align_corners=False)
    shown = Image.fromarray(cases[0].exemplar).resize((224, 224))
    exemplar = (torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255 - mean) / std
    with torch.inference_mode():
        expected = 100 * F.cosine_similarity(tower.network(cut), tower.network(exemplar[None]))
    assert values[0] == pytest.approx(expected.item(), abs=1e-3)


def test_set_scores_are_the_distances_of_the_features(settings, monkeypatch):
    cases, edits = make(9)
    kid = replace(METRICS["kid"], make=lambda tools: tools.distance(kernel, "clip"))
    monkeypatch.setitem(METRICS, "kid", kid)
    found = by_name(score(cases, edits, settings("clip-fid", "kid", batch_size=4)))
    tower = load_tower("clip", SMALL, settings().weights["clip"])
    a, b = tower.whole(edits), tower.whole([case.image for case in cases])
    assert found["clip-fid"].value == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert found["kid"].value == pytest.approx(kernel(a, b, Bootstrap(set_resamples=2)).value, rel=1e-3)
    card = found["clip-fid"].card
    assert (card.pictures, card.feature_model, card.weights_sha256) == (9, SMALL, tower.sha256)
    assert card.weights_sha256 == sha256_of(Path(settings().weights["clip"]))
    assert "9 real images from the cases' own" in card.notes
    assert found["clip-fid"].low < found["clip-fid"].value < found["clip-fid"].high


def test_a_reference_folder_takes_the_place_of_the_true_images(settings, tmp_path):
    cases, edits = make(6)
    folder = tmp_path / "real"
    folder.mkdir()
    real = [np.random.default_rng(i).integers(0, 256, (30, 40 + i, 3), dtype=np.uint8) for i in range(5)]
    for index, picture in enumerate(real):
        Image.fromarray(picture).save(folder / f"{index}.png")
    (found,) = score(cases, edits, settings("clip-fid", batch_size=2), folder)
    tower = load_tower("clip", SMALL, settings().weights["clip"])
    assert found.value == pytest.approx(frechet_distance(tower.whole(edits), tower.whole(real)), rel=1e-4)
    assert "5 real images from a folder" in found.card.notes
    (own,) = score(cases, edits, settings("clip-fid"))
    assert len({found.card.reference_sha256, own.card.reference_sha256, ""}) == 3
    (folder / "4.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"4\.png' cannot be read"):
        score(cases, edits, settings("clip-fid"), folder)
    with pytest.raises(UserError, match="is not a folder"):
        score(cases, edits, settings("clip-fid"), tmp_path / "none")
    with pytest.raises(UserError, match="holds no image"):
        score(cases, edits, settings("clip-fid"), _empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_a_single_image_has_no_distance_but_the_other_scores(settings):
    cases, edits = make(1)
    fid, region = score(cases, edits, settings("clip-fid", "region-clip"))
    assert not fid.run
    assert fid.why_not == "not run: needs at least two images on either side, not 1 and 1"
    assert (fid.card.pictures, fid.card.feature_model) == (1, SMALL)
    assert region.run


def test_features_that_are_not_finite_are_left_out(settings, monkeypatch):
    whole = Tower.whole

    def broken(self, pictures):
        features = whole(self, pictures).copy()
        features[[i for i, one in enumerate(pictures) if one[0, 0, 0] == 7 and one[0, 0, 1] == 7]] = np.nan
        return features

    monkeypatch.setattr(Tower, "whole", broken)
    cases, edits = make(5)
    edits[3] = edits[3].copy()
    edits[3][0, 0] = 7
    (found,) = score(cases, edits, settings("clip-fid"))
    assert found.card.excluded == {"features not finite": 1}
    assert found.card.pictures == 4
    (found,) = score(cases[2:4], edits[2:4], settings("clip-fid"))
    assert found.why_not.endswith("either side, not 1 and 2 (1 features not finite)")
    cases[1] = replace(cases[1], image=cases[1].image.copy())
    cases[1].image[0, 0] = 7
    found, seam = score(cases, edits, settings("clip-fid", "seam"))
    assert found.why_not == ("not run: features of 1 of 5 real images are not finite; check the weights")
    assert found.card.reference_sha256
    assert seam.run, "what else was scored is not lost"


def test_qs_drops_what_fills_no_batch_of_fifty_unless_told(settings, tmp_path):
    cases, edits = make(53)
    pictures = tmp_path / "real"
    pictures.mkdir()
    for index, case in enumerate(cases[:40]):
        Image.fromarray(case.image).save(pictures / f"{index:02d}.png")
    out = tmp_path / "m.safetensors"
    arguments = ["--images", str(pictures), "--out", str(out), "--components", "2", "--tower", SMALL]
    assert fit_mixture.main([*arguments, "--tower-weights", f"clip={settings().weights['clip']}"]) == 0
    (dropped,) = score(cases, edits, settings("qs", mixture=out))
    (kept,) = score(cases, edits, settings("qs", mixture=out, drop_remainder=False))
    tower = load_tower("clip", SMALL, settings().weights["clip"])
    expected = quality(load_mixture(out).log_likelihood(tower.whole(edits)))
    assert kept.value == pytest.approx(expected.mean(), rel=1e-4)
    assert dropped.value == pytest.approx(expected[:50].mean(), rel=1e-4)
    assert (kept.card.pictures, dropped.card.pictures) == (53, 50)
    assert dropped.card.excluded == {"after the last whole batch of 50": 3}
    (few,) = score(cases[:7], edits[:7], settings("qs", mixture=out))
    assert (few.run, few.why_not) == (
        False,
        "not run: it is made of whole batches of 50 images, and there are 7",
    )
    stranger = tmp_path / "stranger.safetensors"  # of the same weights in another network
    noted = load_mixture(out)
    replace(noted, card=noted.card | {"feature_model": "ViT-B-32"}).save(stranger)
    with pytest.raises(UserError, match="is of the features of 'ViT-B-32', not"):
        score(cases, edits, settings("qs", mixture=stranger))
    other = settings("qs", mixture=out, weights={"clip": settings().weights["dino"]})
    with pytest.raises(UserError, match="was fitted to features of other weights"):
        score(cases, edits, other)


def test_fitting_says_what_is_wrong(tmp_path, capsys):
    arguments = ["--images", str(tmp_path), "--out", str(tmp_path / "m.pkl"), "--tower-weights"]
    assert fit_mixture.main([*arguments, "clip=x"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert fit_mixture.main([*arguments, "dino=x"]) == 2
    assert "clip=FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "foo"], "--device 'foo' cannot be used here"),
        (["--seed", "-1"], "the seed of the fit is 0 to 2**32 - 1, not -1"),
        (["--components", "3"], "3 components need more than 3 images"),
        (["--out", "FOLDER.safetensors"], "it is a folder"),
        (["--out", "x" * 300 + ".safetensors"], "cannot write"),
    ],
)
def test_fitting_notices_what_is_wrong_before_the_work(tmp_path, monkeypatch, capsys, more, message):
    def too_late(*arguments):
        raise AssertionError("the tower was loaded first")

    monkeypatch.setattr("pbe.evaluation.metrics.towers.load_tower", too_late)
    monkeypatch.chdir(tmp_path)
    Path("FOLDER.safetensors").mkdir()
    Path("pictures").mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8)).save(f"pictures/{index}.png")
    arguments = ["--images", "pictures", "--out", "m.safetensors", "--tower-weights", "clip=x"]
    assert fit_mixture.main([*arguments, "--components", "2", *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FOLDER.safetensors", "pictures"]


def test_real_images_are_read_into_arrays_of_their_own(tmp_path):
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "a.png")
    (batch,) = ImageFolder(tmp_path).batches(2)
    assert batch.edits[0].shape == (6, 8, 3)
    assert batch.edits[0].flags.writeable, "torch warns of arrays that are not"
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0), b"IDAT")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(UserError, match=r"b\.png' cannot be read as an image: Image size"):
        list(ImageFolder(tmp_path).batches(2))


def test_what_lacks_its_weights_is_not_run_and_says_what_it_needs():
    cases, edits = make(2)
    names = ("clip-fid", "qs", "region-clip", "fid", "kid", "dino-similarity", "lpips-outside")
    found: list[Score] = score(cases, edits, ScoreSettings(names))
    assert [one.run for one in found] == [False] * len(names)
    assert all(one.why_not.startswith("not run: needs the weights of") for one in found)
    assert "--tower-weights inception=FILE" in by_name(found)["fid"].why_not


def test_toy_scores_are_those_of_the_toy_benchmark(features):
    cases, edits = make(4)
    found = by_name(score(cases, edits, ScoreSettings(("toy-fd", "toy-similarity"), bootstrap=FEW)))
    regions = [region(edit, case.mask) for case, edit in zip(cases, edits, strict=True)]
    expected = cosines(features.squashed(regions), features.squashed([case.exemplar for case in cases]))
    assert found["toy-similarity"].per_case == pytest.approx(expected, abs=1e-5)
    assert found["toy-similarity"].card.weights_sha256 == features.sha256
    assert found["toy-fd"].family == "toy"
    assert isinstance(load_tower("lite2", None, None), LiteTower)


def test_clips_preprocessing_is_torchvisions():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    picture = np.random.default_rng(0).integers(0, 256, (301, 419, 3), dtype=np.uint8)
    wide = np.random.default_rng(1).integers(0, 256, (301, 421, 3), dtype=np.uint8)  # half a pixel to round
    for one in (picture, picture.transpose(1, 0, 2), picture[:100, :90], wide):
        reference = Compose([Resize(224, InterpolationMode.BICUBIC), CenterCrop(224)])
        expected = np.asarray(reference(Image.fromarray(np.ascontiguousarray(one))))
        assert np.array_equal(centre_crop(np.ascontiguousarray(one), 224), expected)


def test_weights_of_another_network_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match=r"holds no weights of vit/64x2.*shape"):
        load_tower("clip", "vit/64x2-patch56-heads2-mlp64", str(weights))
    with pytest.raises(UserError, match="there is no file"):
        load_tower("clip", SMALL, str(tmp_path / "none.pt"))
    torch.save({"a": torch.ones(1), "b": print}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="cannot be read as a plain state dict"):
        read_state(tmp_path / "code.pt")
    with pytest.raises(UserError, match="timm has no model"):
        load_tower("dino", "timm/nothing", str(weights))
    with pytest.raises(UserError, match="nor timm/<name>"):
        load_tower("clip", "nothing", str(weights))
    torch.save(read_state(weights), tmp_path / "plain.pt")
    with pytest.raises(UserError, match="no weights of torch-fidelity's Inception"):
        load_tower("inception", None, str(tmp_path / "plain.pt"))
    assert set(TOWERS) == {"clip", "dino", "inception", "lite2"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_of_all_of_clip_serve_its_image_tower(weights, tmp_path):
    whole = {f"visual.{key}": value for key, value in read_state(weights).items()}
    torch.save({"state_dict": whole | {"logit_scale": torch.ones(())}}, tmp_path / "whole.pt")
    picture = [make(1)[1][0]]
    plain, inner = (load_tower("clip", SMALL, str(path)) for path in (weights, tmp_path / "whole.pt"))
    assert np.array_equal(plain.whole(picture), inner.whole(picture))
    assert plain.sha256 != inner.sha256  # of the files' bytes
    program = save_program(whole | {"input_resolution": torch.tensor(224)}, tmp_path / "ViT-B-32.pt")
    scripted = load_tower("clip", SMALL, str(program))
    assert np.array_equal(plain.whole(picture), scripted.whole(picture))
    assert scripted.sha256 == sha256_of(program), "the sum that OpenAI publishes is of the archive"
    with pytest.raises(UserError, match="is a TorchScript program, not a state dict of torch-fidelity's"):
        load_tower("inception", None, str(program))


def test_a_tag_without_a_network_is_one_line(monkeypatch):
    def no_network(*args, **kwargs):
        raise FileNotFoundError("no way to the Hub\nat all")

    monkeypatch.setattr("pbe.checkpoints.tower_weights.open_clip.create_model", no_network)
    with pytest.raises(
        UserError, match=r"'openai' of ViT-B-32-quickgelu cannot be downloaded \(no way to the Hub\)"
    ):
        load_tower("clip", None, "openai")


def test_lpips_outside_runs_on_saved_random_weights(tmp_path):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    cases, edits = make(3, size=64)
    edits[2] = cv2.GaussianBlur(edits[2], (0, 0), 2)
    settings = ScoreSettings(
        ("lpips-outside",), weights={"lpips": str(tmp_path / "alexnet.pth")}, bootstrap=FEW
    )
    (found,) = score(cases, edits, settings)
    assert found.per_case[:2].tolist() == [0.0, 0.0]
    assert found.per_case[2] > 0.0
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(net="alex", pnet_rand=True)
    own = network.net.state_dict()
    saved = torch.load(tmp_path / "alexnet.pth", weights_only=True)
    network.net.load_state_dict({key: saved[f"features.{key.split('.', 1)[1]}"] for key in own})
    filled = np.where(cases[2].mask[..., None] > 127, cases[2].image, edits[2])
    pair = [torch.from_numpy(x).permute(2, 0, 1)[None] / 127.5 - 1 for x in (cases[2].image, filled)]
    assert found.per_case[2] == pytest.approx(network(*pair).item(), rel=1e-5)
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "small.pth")
    small = replace(settings, weights={"lpips": str(tmp_path / "small.pth")})
    with pytest.raises(UserError, match="no weights of torchvision's AlexNet"):
        score(cases, edits, small)


def test_inception_runs_on_saved_random_weights(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Untrained(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, state, **kwargs):
            return None

    torch.save({}, tmp_path / "none.pt")
    torch.manual_seed(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "none.pt")
    torch.save(network.state_dict(), tmp_path / "inception.pt")
    cases, edits = make(2)
    tower = load_tower("inception", None, str(tmp_path / "inception.pt"))
    features = tower.whole(edits)
    pixels = torch.from_numpy(np.stack(edits)).permute(0, 3, 1, 2)
    assert features == pytest.approx(network(pixels)[0].numpy(), abs=1e-4)
    files = {"inception": str(tmp_path / "inception.pt")}
    fid, kid = score(cases, edits, ScoreSettings(("fid", "kid"), weights=files, bootstrap=FEW))
    expected = frechet_distance(features, tower.whole([case.image for case in cases]))
    assert fid.value == pytest.approx(expected, abs=1e-4)
    assert fid.run
    assert kid.run
