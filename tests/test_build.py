"""Specs: a model as plain data, and back; what does not fit is refused, and nothing is run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import VMA, AddressPrior, Memory, over_slots

pytest.importorskip("jsonargparse")
yaml = pytest.importorskip("yaml")
# jsonargparse warns of names like os.system before it refuses them.
JSONARGPARSE_WARNS = pytest.mark.filterwarnings(
    r"ignore:\s*(By default only one Jsonarg|Importing '):DeprecationWarning"
)


class FirstSlots(AddressPrior):
    """A user's own prior: the first slots are more likely."""

    def __init__(self, rate: float = 0.5, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.rate, self.shape = rate, shape

    def forward(self, memory: Memory) -> dist.Categorical:
        return over_slots(-self.rate * torch.arange(memory.num_slots).expand(*memory.batch_shape, -1), memory)


def vectors(**parts: Any) -> VMA:
    return VMA.for_vectors(4, latent_dim=2, num_features=6, hidden=(8,), **parts)


def images(**parts: Any) -> VMA:
    return VMA.for_images((1, 6, 5), latent_dim=2, num_features=6, width=4, **parts)


MODELS = {
    "vectors": vectors,
    "images": images,
    "images-conv": lambda: images(decoder="conv"),
    "two encoders": lambda: vectors(x_encoder=pv.nn.MLPEncoder((4,), 6, ())),
    "other parts": lambda: vectors(
        address_prior=pv.LearnedPrior(6),
        latent_prior=pv.StandardPrior(2),
        address_guide=pv.SimilarityGuide(6, 3, "dot", 2.0, tied=True),
        likelihood=pv.GaussianDecoder(pv.nn.MLPDecoder((4,), 2, 6, (3, 4)), 0.1, learn_scale=False),
        name="other",
    ),
    "own part": lambda: vectors(address_prior=FirstSlots(0.25, shape=(1, 2))),
}


def spec_with(role: str, part: Any) -> dict[str, Any]:
    spec = vectors().spec()
    spec["init_args"][role] = part
    return spec


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str) -> None:
    vma = MODELS[name]()
    spec = vma.spec()
    assert json.loads(json.dumps(spec)) == spec
    before = copy.deepcopy(spec)
    again = pv.build(spec)
    assert spec == before
    assert again.spec() == spec
    assert repr(again) == repr(vma)
    again.load_state_dict(vma.state_dict())
    memory, event = torch.rand(5, *vma.event_shape), torch.rand(3, *vma.event_shape).round()
    labelled = Memory(memory, torch.arange(5))
    assert torch.equal(again.classify(labelled, event), vma.classify(labelled, event))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
@pytest.mark.parametrize("whole", [True, False])
def test_files(name: str, suffix: str, whole: bool, tmp_path: Path) -> None:
    vma, path = MODELS[name](), tmp_path / f"model{suffix}"
    spec = vma.spec() if whole else vma.spec()["init_args"]
    path.write_text(json.dumps(spec) if suffix == ".json" else yaml.safe_dump(spec))
    assert pv.build(path).spec() == pv.build(str(path)).spec() == vma.spec()


def test_short_names_and_defaults() -> None:
    vma = pv.build(
        {
            "address_prior": "UniformPrior",
            "latent_prior": {"class_path": "StandardPrior", "init_args": {"latent_dim": 3}},
            "likelihood": {
                "class_path": "GaussianDecoder",
                "init_args": {
                    "network": {"class_path": "MLPDecoder", "init_args": {"event_shape": [4], "latent_dim": 3}}
                },
            },
            "address_guide": {"class_path": "SimilarityGuide", "init_args": {"normalise": "dot"}},
            "latent_guide": {"class_path": "pyro_vmem.GaussianGuide", "init_args": {"latent_dim": 3, "hidden": [9]}},
            "template_encoder": {"class_path": "MLPEncoder", "init_args": {"event_shape": [4]}},
        }
    )
    assert type(vma) is VMA
    assert isinstance(vma.address_prior, pv.UniformPrior)
    assert vma.address_guide.normalise == "dot"
    assert vma.latent_guide.join.first.out_features == 9
    assert (vma.event_shape, vma.latent_dim, vma.name, vma.x_encoder) == ((4,), 3, "vma", None)
    assert vma.generate(Memory(torch.rand(5, 4)), 2).shape == (2, 4)


def test_a_part_of_ones_own_by_its_name_or_path() -> None:
    path = f"{FirstSlots.__module__}.FirstSlots"
    assert vectors(address_prior=FirstSlots()).spec()["init_args"]["address_prior"]["class_path"] == path
    vma = pv.build(spec_with("address_prior", {"class_path": path, "init_args": {"rate": 2.0}}))
    assert type(vma.address_prior) is FirstSlots
    assert vma.address_prior.rate == 2.0


def test_weights_are_fresh_and_no_seed_is_set() -> None:
    vma = vectors()
    one, two = pv.build(vma.spec()), pv.build(vma.spec())
    assert not torch.equal(one.address_guide.embed_memory.weight, two.address_guide.embed_memory.weight)


@pytest.mark.parametrize(
    ("role", "part", "message"),
    [
        ("address_guide", "SimilarityGuied", r"SimilarityGuied[\s\S]*The parts of pyro_vmem: .*SimilarityGuide, "),
        ("address_guide", "UniformPrior", "UniformPrior"),  # a part, but not of this kind
        ("address_guide", "pyro_vmem.UniformPrior", "does not correspond to a subclass of AddressGuide"),
        ("address_guide", "pyro_vmem.AddressGuide", "AddressGuide"),  # abstract
        ("address_guide", 5, "Not a valid subclass of AddressGuide"),
        ("address_guide", None, "address_guide"),
        ("address_guide", ["SimilarityGuide"], "address_guide"),
        (
            "address_guide",
            {"class_path": "SimilarityGuide", "init_args": {"temprature": 1.0}},
            r"'?temprature'? is not accepted",
        ),
        ("address_guide", {"class_path": "SimilarityGuide", "init_args": {"num_features": "six"}}, "Got value: six"),
        ("address_guide", {"class_path": "SimilarityGuide", "init_args": {"normalise": "both"}}, "'cosine'"),
        (
            "address_guide",
            {"class_path": "SimilarityGuide", "init_args": {"temperature": -1.0}},
            "^temperature: expected",
        ),
        ("address_guide", {"class_path": "SimilarityGuide", "arguments": {}}, "AddressGuide"),
        (
            "latent_guide",
            {"class_path": "GaussianGuide", "init_args": {"latent_dim": 5}},
            "^latent_guide: its latent_dim",
        ),
        ("latent_guide", {"class_path": "GaussianGuide", "init_args": {"hidden": "wide"}}, "hidden"),
        (
            "template_encoder",
            {"class_path": "ConvEncoder", "init_args": {"image_shape": [28, 28]}},
            "image_shape: expected",
        ),
        ("name", {"class_path": "UniformPrior"}, "name"),
        ("no_such_part", "UniformPrior", "no_such_part"),
    ],
)
def test_what_does_not_fit_is_refused(role: str, part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pv.build(spec_with(role, part))


def test_a_missing_part_is_named() -> None:
    with pytest.raises(
        ValueError, match="required: address_prior, latent_prior, likelihood, address_guide, latent_guide"
    ):
        pv.build({})


@pytest.mark.parametrize("spec", [3, None, ["UniformPrior"], 2.5])
def test_a_spec_that_is_no_mapping_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"spec: expected a dict, or the path"):
        pv.build(spec)


@pytest.mark.parametrize(
    "class_path", ["os.system", "builtins.exec", "subprocess.check_output", "os", "no.such.module"]
)
@pytest.mark.parametrize("role", ["", "address_prior", "likelihood", "template_encoder", "name"])
@JSONARGPARSE_WARNS
def test_a_hostile_spec_runs_nothing(class_path: str, role: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')"
    for arguments in (
        {"command": f"touch {marker}"},
        {"source": code, "code": code},
        {"args": ["touch", str(marker)]},
        {"dict_kwargs": {"args": ["touch", str(marker)]}},
    ):
        part = {"class_path": class_path, "init_args": arguments}
        with pytest.raises(ValueError, match="spec"):
            pv.build(spec_with(role, part) if role else part)
    assert not marker.exists()


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "model.yaml"
    path.write_text(f"address_prior: !!python/object/apply:os.system ['touch {marker}']")
    with pytest.raises(ValueError, match=r"spec: .*model.yaml' is not valid .yaml"):
        pv.build(path)
    assert not marker.exists()


def test_files_that_hold_no_spec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"spec: there is no file 'no/such/file\.yaml'"):
        pv.build("no/such/file.yaml")
    with pytest.raises(ValueError, match="spec: there is no file"):
        pv.build(tmp_path)
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"list\.json' holds list, expected a mapping"):
        pv.build(tmp_path / "list.json")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match=r"empty\.yaml' holds NoneType, expected a mapping"):
        pv.build(tmp_path / "empty.yaml")
    (tmp_path / "broken.json").write_text('{"address_prior": ')
    with pytest.raises(ValueError, match=r"broken\.json' is not valid \.json"):
        pv.build(tmp_path / "broken.json")
