"""The file of an ablation: what is read, merged and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pbe.config import Config, load_config
from pbe.data.toy.scenes import ToyWorld
from pbe.errors import UserError
from pbe.evaluation.ablation import stages
from pbe.evaluation.ablation.config import TOY_CASES, Ablation, load_ablation
from pbe.evaluation.ablation.stages import cache_settings, fingerprint_of, shaping_settings
from pbe.evaluation.benchmark.toy import check_count
from pbe.training.latent_cache import settings as latent_cache_settings

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MASKS = "data.sample.arbitrary_mask_share"


def write(folder: Path, file: str = "own.yaml", **content: object) -> Path:
    values = {
        "base": str(CONFIGS / "toy.yaml"),
        "cumulative": True,
        "rows": [
            {"name": "a", "overrides": {MASKS: 0.0, "trainer.max_steps": 7}},
            {"name": "b", "overrides": {MASKS: 0.5}, "sampling": {"guidance_scale": 5.0}},
            {"name": "c", "title": "the last", "overrides": {"objective.drop_probability": 0.0}},
        ],
    } | content
    path = folder / file
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def test_cumulative_rows_add_to_the_row_before_and_others_to_the_base(tmp_path: Path) -> None:
    a, b, c = load_ablation(write(tmp_path)).rows
    assert a.overrides == {MASKS: 0.0, "trainer.max_steps": 7}
    assert b.overrides == {MASKS: 0.5, "trainer.max_steps": 7}
    assert c.overrides == {MASKS: 0.5, "trainer.max_steps": 7, "objective.drop_probability": 0.0}
    assert [row.sampling.guidance_scale for row in (a, b, c)] == [1.0, 5.0, 5.0]
    assert (b.title, c.title) == ("b", "the last")
    _, alone, last = load_ablation(write(tmp_path, cumulative=False)).rows
    assert alone.overrides == {MASKS: 0.5}
    assert last.sampling.guidance_scale == 1.0


def test_a_training_has_base_shared_and_own_switches(tmp_path: Path) -> None:
    ablation = load_ablation(write(tmp_path, shared={"data.batch_size": 3, "trainer.max_steps": 5}))
    config = ablation.training_config(ablation.rows[1].overrides, "row 'b'")
    assert config.data.sample.arbitrary_mask_share == 0.5
    assert (config.data.batch_size, config.trainer.max_steps) == (3, 7)
    assert config.cache == load_config(CONFIGS / "toy.yaml").cache  # of the base


def test_an_ablation_extends_a_row_of_another_one(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", seeds=[1, 2], comparisons=[["a", "b"]], title="first")
    path = write(
        tmp_path, "second.yaml", base=None, cumulative=None, extends={"file": "first.yaml", "row": "b"},
        rows=[{"name": "x"}, {"name": "y", "overrides": {MASKS: 1.0}, "sampling": {"steps": 9}}],
        seeds=[3],
    )  # fmt: skip
    second = load_ablation(path)
    assert (second.config.name, second.config.seeds, second.config.comparisons) == ("second", [3], [])
    x, y = second.rows
    assert x.overrides == {MASKS: 0.5, "trainer.max_steps": 7}
    assert y.overrides == {MASKS: 1.0, "trainer.max_steps": 7}
    assert (x.sampling.guidance_scale, y.sampling.guidance_scale, y.sampling.steps) == (5.0, 5.0, 9)
    assert second.base.resolve() == (CONFIGS / "toy.yaml").resolve()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sedes": [1]}, r"unknown key 'sedes'; the nearest valid one is 'seeds'"),
        (
            {"evaluation": {"bench": "toy"}},
            r"'evaluation.bench'; the nearest valid one is 'evaluation.benchmark'",
        ),
        (
            {"rows": [{"name": "a", "tile": "x"}]},
            r"rows\[0\]: unknown key 'tile'.*'title'",
        ),
        ({"rows": [{"name": "a", "sampling": {"guidance": 1}}]}, r"rows\[0\].*sampling.guidance_scale"),
        (
            {"rows": [{"name": "a", "overrides": {"objective.drop_probabilty": 0.1}}]},
            r"row 'a': .*nearest valid one is 'objective.drop_probability'",
        ),
        ({"rows": [{"name": "a", "overrides": {"data.batch_size": "many"}}]}, r"row 'a': .*data.batch_size"),
        ({"rows": [{"name": "a", "overrides": {"seed": 3}}]}, "'seed' is set by the runner"),
        ({"rows": [{"name": "a", "sampling": {"solver": "pmls"}}]}, r"row 'a': no solver 'pmls'"),
        ({"rows": [{"name": "a", "sampling": {"steps": 0}}]}, r"row 'a': steps must be at least 1"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two rows 'a'"),
        ({"rows": [{"name": "a b"}]}, "'name' is 'a b'"),
        ({"rows": []}, "'rows' must be a list"),
        ({"rows": ["a"]}, "a row is a mapping"),
        ({"rows": [{"name": "a", "start": "prior"}]}, "'prior.overrides' is not given"),
        ({"prior": {"overrides": {"task": "walk"}}}, "prior: .*'task'"),
        ({"seeds": [1, 1]}, "'seeds'"),
        ({"seeds": []}, "'seeds'"),
        ({"comparisons": [["a", "z"]]}, "there is no row 'z'"),
        ({"comparisons": [["a"]]}, "pairs of two rows"),
        ({"evaluation": {"level": 1.5}}, "level between 0 and 1"),
        ({"base": "nowhere.yaml"}, "no configuration file"),
        ({"base": None}, "'base' must name"),
        ({"extends": {"file": "own.yaml", "row": "a"}}, "extends itself"),
        ({"extends": "paper"}, "'extends' names a 'file'"),
        (
            {"rows": [{"name": "a", "overrides": [1]}]},
            r"rows\[0\]: wrong value for 'overrides': it is a section of keys",
        ),
        (
            {"rows": [{"name": "a", "sampling": [1]}]},
            r"rows\[0\]: wrong value for 'sampling': it is a section of keys",
        ),
        ({"comparisons": {"a": "b"}}, "wrong value for 'comparisons': it is a list"),
        ({"prior": {"overrides": [1]}}, r"'prior\.overrides'"),
        ({"title": ["a"]}, "wrong value for 'title': it is a single value"),
        ({"rows": [{"name": "a", "title": "two\nlines"}]}, r"rows\[0\]: 'title' has a line break"),
        ({"evaluation": {"objects": 500}}, "'evaluation.objects' is 500; there are 181"),
        ({"evaluation": {"objects": -3}}, "'evaluation.objects' is -3"),
        ({"rows": [{"name": "a", "sampling": {"steps": 5000}}]}, "row 'a': steps is 5000; .* than 1000"),
        (
            {
                "shared": {"model.schedule.timesteps": 500},
                "rows": [{"name": "a", "sampling": {"steps": 501}}],
            },
            "row 'a': steps is 501; .* than 500",
        ),
        ({"seeds": [1, -2]}, "'seeds' has -2; seeds go from 0"),
        ({"seeds": [2**32]}, "'seeds' has 4294967296; seeds go from 0 to 4294967295"),
        ({"scenes": {"seed": -1}}, "'scenes.seed' has -1"),
        ({"evaluation": {"noise_seed": -1}}, "'evaluation.noise_seed' has -1"),
        ({"evaluation": {"benchmark_seed": -1}}, "'evaluation.benchmark_seed' has -1"),
        ({"name": "trainings"}, "'name' is 'trainings', a folder that stages lie in"),
        ({"name": "../x"}, r"'name' is '\.\./x'; it must be the plain name"),
        ({"name": ".."}, r"'name' is '\.\.'"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, content: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_ablation(write(tmp_path, **content))
    assert "\n" not in str(caught.value)


def test_a_list_over_an_inherited_mapping_is_one_clear_line(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml")
    path = write(tmp_path, base=None, extends={"file": "first.yaml", "row": "b"}, scenes=[1])
    with pytest.raises(UserError, match="wrong value for 'scenes': it is a section of keys"):
        load_ablation(path)


def test_files_that_extend_each_other_are_named(tmp_path: Path) -> None:
    first = write(tmp_path, "first.yaml", extends={"file": "second.yaml", "row": "a"})
    second = write(tmp_path, "second.yaml", extends={"file": "first.yaml", "row": "a"})
    with pytest.raises(UserError) as caught:
        load_ablation(first)
    assert str(caught.value) == f"{second}: it extends itself: '{first}' extends '{second}' extends '{first}'"


def test_the_toy_benchmark_has_as_many_cases_as_are_allowed() -> None:
    assert check_count(ToyWorld(), TOY_CASES) == TOY_CASES
    with pytest.raises(UserError):
        check_count(ToyWorld(), TOY_CASES + 1)


@pytest.mark.parametrize("text", ["rows: [", "- a list", "\x00"])
def test_a_file_that_is_no_ablation(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_ablation(path)
    with pytest.raises(UserError, match="no ablation at"):
        load_ablation(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_those_that_ship_are_read(path: Path) -> None:
    ablation = load_ablation(path)
    assert len(ablation.rows) > 1
    assert len(ablation.config.seeds) >= 2


def switches(ablation: Ablation) -> list[tuple[object, ...]]:
    found = []
    for row in ablation.rows:
        config = ablation.training_config(row.overrides, row.name)
        sample = config.data.sample
        found.append(
            (
                row.start, config.model.exemplar_encoder.tokens, sample.augment.enabled,
                sample.arbitrary_mask_share, config.objective.drop_probability, row.sampling.guidance_scale,
            )
        )  # fmt: skip
    return found


def test_the_papers_rows() -> None:
    ablation = load_ablation(CONFIGS / "ablations" / "paper.yaml")
    assert switches(ablation) == [
        ("", "all", False, 0.0, 0.0, 1.0),
        ("prior", "all", False, 0.0, 0.0, 1.0),
        ("prior", "all", True, 0.5, 0.0, 1.0),
        ("prior", "class", True, 0.5, 0.0, 1.0),
        ("prior", "class", True, 0.5, 0.2, 5.0),
    ]


def test_the_form_works_for_the_papers_sizes(tmp_path: Path) -> None:
    rows = [{"name": "all", "overrides": {"model.exemplar_encoder.tokens": "all"}}, {"name": "class"}]
    ablation = load_ablation(write(tmp_path, base=str(CONFIGS / "paper.yaml"), rows=rows))
    assert ablation.training_config(ablation.rows[0].overrides, "all").model.unet.model_channels == 320


def test_trainings_and_caches_of_samples_made_otherwise_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Older ones learned from padding that shows the hidden object."""
    before = [fingerprint_of(settings(Config())) for settings in (shaping_settings, cache_settings)]
    assert shaping_settings(Config())["samples"] == cache_settings(Config())["samples"] == 2
    for module in (stages, latent_cache_settings):
        monkeypatch.setattr(module, "SAMPLES", 3)
    after = [fingerprint_of(settings(Config())) for settings in (shaping_settings, cache_settings)]
    assert all(one != other for one, other in zip(before, after, strict=True))
