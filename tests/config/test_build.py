"""Specs: a model as plain data, and back; what does not fit is refused, and nothing is run."""

from __future__ import annotations

import copy
import inspect
import json
import re
import resource
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyro.distributions as dist
import pytest
import torch

import pyro_vmem as pv
from pyro_vmem import VMA, AddressGuide, AddressPrior, Memory, Part, over_slots
from pyro_vmem.app.experiment import Experiment
from pyro_vmem.config.arguments import checked
from pyro_vmem.train import save_checkpoint

yaml = pytest.importorskip("yaml")


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
    "two encoders": lambda: vectors(x_encoder=pv.parts.MLPEncoder((4,), 6, ())),
    "other parts": lambda: vectors(
        address_prior=pv.LearnedPrior(6),
        latent_prior=pv.StandardPrior(2),
        address_guide=pv.SimilarityGuide(6, 3, "dot", 2.0, tied=True),
        likelihood=pv.GaussianDecoder(pv.parts.MLPDecoder((4,), 2, 6, (3, 4)), 0.1, learn_scale=False),
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
    for name in ("FirstSlots", path):
        vma = pv.build(spec_with("address_prior", {"class_path": name, "init_args": {"rate": 2.0}}))
        assert type(vma.address_prior) is FirstSlots
        assert vma.address_prior.rate == 2.0


def test_a_class_that_was_defined_again_is_the_last_one() -> None:
    first = type("Again", (FirstSlots,), {})
    assert type(pv.build(spec_with("address_prior", "Again")).address_prior) is first
    second = type("Again", (FirstSlots,), {})
    assert type(pv.build(spec_with("address_prior", "Again")).address_prior) is second
    notebook = types.ModuleType("notebook_of_test_build")
    notebook.Again = first  # type: ignore[attr-defined]
    first.__module__ = second.__module__ = notebook.__name__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, notebook.__name__, notebook)
        assert type(pv.build(spec_with("address_prior", "Again")).address_prior) is first


def test_a_name_that_two_modules_use_is_to_be_written_in_full() -> None:
    one, two = type("Twice", (FirstSlots,), {}), type("Twice", (FirstSlots,), {})
    one.__module__, two.__module__ = "one", "two"
    with pytest.raises(ValueError, match=re.escape("'Twice' names more than one AddressPrior: one.Twice, two.Twice.")):
        pv.build(spec_with("address_prior", "Twice"))
    assert type(pv.build(spec_with("address_prior", "two.Twice")).address_prior) is two


def test_a_part_may_be_given_as_it_is() -> None:
    prior = FirstSlots(3.0)
    assert pv.build(spec_with("address_prior", prior)).address_prior is prior
    with pytest.raises(ValueError, match=r"spec.address_prior: expected the name of an AddressPrior"):
        pv.build(spec_with("address_prior", pv.SimilarityGuide(6)))


class Collected(AddressPrior):
    """Arguments of many types, to see what a spec makes of each."""

    def __init__(
        self,
        priors: list[AddressPrior],
        by_name: dict[str, float | None],
        pair: tuple[int, str] = (1, "a"),
        flag: bool = False,
        limit: int | Literal["all"] = "all",
        loose=None,
        **more: float,
    ) -> None:
        super().__init__()
        self.priors = torch.nn.ModuleList(priors)

    def forward(self, memory: pv.EncodedMemory) -> dist.Categorical:
        return self.priors[0](memory)


def collected(**values: Any) -> Any:
    arguments = {"priors": ["UniformPrior"], "by_name": {}} | values
    return pv.build(spec_with("address_prior", {"class_path": "Collected", "init_args": arguments})).address_prior


def test_values_of_many_types() -> None:
    part = collected(
        priors=["UniformPrior", {"class_path": "LearnedPrior", "init_args": {"num_features": 6}}],
        by_name={"a": 1, "b": None},
        pair=[2, "b"],
        flag=True,
        limit=3,
        loose={"inner": [{"class_path": "StandardPrior", "init_args": {"latent_dim": 4}}, 1.5]},
        extra=1,
    )
    arguments = part.arguments()
    assert [type(prior) for prior in part.priors] == [pv.UniformPrior, pv.LearnedPrior]
    assert arguments["by_name"] == {"a": 1.0, "b": None}
    assert isinstance(arguments["by_name"]["a"], float)
    assert (arguments["pair"], arguments["flag"], arguments["limit"], arguments["extra"]) == ((2, "b"), True, 3, 1.0)
    assert type(arguments["loose"]["inner"][0]) is pv.StandardPrior
    again = pv.build(json.loads(json.dumps(spec_with("address_prior", part.spec()))))
    assert again.address_prior.spec() == part.spec()
    assert repr(again.address_prior) == repr(part)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flag": 1}, "spec.address_prior.flag: expected bool, got 1 (int)."),
        ({"limit": True}, "spec.address_prior.limit: expected a whole number or 'all', got True (bool)."),
        ({"limit": 1.5}, "spec.address_prior.limit: expected a whole number or 'all', got 1.5 (float)."),
        ({"limit": "al"}, "got 'al' (str). Did you mean 'all'?"),
        ({"pair": [1]}, "spec.address_prior.pair: expected tuple[a whole number, str], got [1] (list)."),
        ({"pair": [1, 2]}, "spec.address_prior.pair: expected tuple[a whole number, str], got [1, 2] (list)."),
        (
            {"by_name": {"a": "b"}},
            "spec.address_prior.by_name: expected dict[str, a number or None], got {'a': 'b'} (dict).",
        ),
        ({"priors": "UniformPrior"}, "priors: expected list[AddressPrior], got 'UniformPrior' (str)."),
        ({"priors": ["StandardPrior"]}, "spec.address_prior.priors[0]: expected the name of an AddressPrior, got"),
        ({"loose": [{"class_path": "os.system"}]}, "spec.address_prior.loose[0]: expected the name of a Part, got"),
    ],
)
def test_values_of_wrong_types(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        collected(**values)


CHECKED_ONLY_WHILE_TYPING = """
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import pyro_vmem as pv

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyro.distributions as dist
    from pyro_vmem import AddressPrior


class MyPriorOfTest(pv.AddressPrior):
    def __init__(self, inner: AddressPrior, temperature: float = 1.0, sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, memory: pv.EncodedMemory) -> dist.Categorical:
        return self.inner(memory)
"""


def test_annotations_that_only_a_type_checker_imports_are_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typed_parts_of_test.py").write_text(CHECKED_ONLY_WHILE_TYPING)
    monkeypatch.syspath_prepend(tmp_path)

    def made(**arguments: Any) -> Any:
        part = with_args("typed_parts_of_test.MyPriorOfTest", **arguments)
        return pv.build(spec_with("address_prior", part), ["typed_parts_of_test"]).address_prior

    try:
        part = made(inner="UniformPrior", temperature=2, sizes=[1, 2])
        assert isinstance(part.inner, pv.UniformPrior)
        assert type(part.arguments()["temperature"]) is float
        for arguments, message in (
            (
                {"inner": "UniformPrior", "temperature": "hot"},
                "temperature: expected a number, got 'hot' (str).",
            ),
            ({"inner": "StandardPrior"}, "inner: expected the name of an AddressPrior, got 'StandardPrior'"),
            ({"inner": "UniformPrior", "sizes": ["a"]}, "sizes: expected Sequence[a whole number], got ['a'] (list)."),
        ):
            with pytest.raises(ValueError, match=re.escape(message)):
                made(**arguments)
    finally:
        sys.modules.pop("typed_parts_of_test", None)


class WithFunction(FirstSlots):
    """A part whose argument is a function, which no spec can hold."""

    def __init__(
        self,
        rule: Callable[[float], float] = float,
        kind: type[AddressPrior] | None = None,
        either: Callable[[float], float] | str = "",
        by_name: dict[str, Callable[[float], float]] | None = None,
        tensor: torch.Tensor | str = "",
        anything: Any = None,
        several: list[Any] | None = None,
        loose=None,
        version: Literal["1.5", "2 beta"] = "1.5",
    ) -> None:
        super().__init__()
        self.result = rule(1.0)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that a module `evil_of_build` leaves behind when it is imported."""
    marker = tmp_path / "imported"
    (tmp_path / "evil_of_build.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef f(x): pass\nclass F: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    sys.modules.pop("evil_of_build", None)


@pytest.mark.parametrize("arguments", [{"rule": "os.system"}, {"rule": "evil_of_build.f"}, {"kind": "evil_of_build.F"}])
def test_a_text_is_never_taken_for_a_function_or_a_class_to_import(arguments: dict[str, str], evil: Path) -> None:
    with pytest.raises(ValueError, match=r"spec\.address_prior\.(rule|kind): expected"):
        pv.build(spec_with("address_prior", with_args("WithFunction", **arguments)))
    assert not evil.exists()


YAML_OF_A_CLASS = "{class_path: evil_of_build.F}"


@pytest.mark.parametrize("text", ["evil_of_build.f", "evil_of_build.F", YAML_OF_A_CLASS, f"[{YAML_OF_A_CLASS}]"])
@pytest.mark.parametrize("name", ["either", "by_name", "tensor", "anything", "several", "loose"])
def test_a_text_stays_a_text(name: str, text: str, evil: Path) -> None:
    value = {"by_name": {"a": text}, "several": [text]}.get(name, text)
    spec = with_args("WithFunction", **{name: value})
    if name == "by_name":
        with pytest.raises(ValueError, match=r"spec\.address_prior\.by_name: expected"):
            pv.build(spec_with("address_prior", spec))
    else:
        assert pv.build(spec_with("address_prior", spec)).address_prior.arguments()[name] == value
    assert not evil.exists()


def test_texts_are_of_the_annotated_type() -> None:
    for version in ("1.5", "2 beta"):
        part = pv.build(spec_with("address_prior", with_args("WithFunction", version=version))).address_prior
        assert part.arguments()["version"] == version
    for arguments, message in (
        ({"version": "1.6"}, "version: expected '1.5' or '2 beta', got '1.6' (str). Did you mean '1.5'?"),
        ({"by_name": "a: b"}, "by_name: expected dict[str, Callable[[a number], a number]] or None, got 'a: b' (str)."),
    ):
        with pytest.raises(ValueError, match=re.escape(f"spec.address_prior.{message}")):
            pv.build(spec_with("address_prior", with_args("WithFunction", **arguments)))
    notes = {"title": "Two words", "more": ["a.b", {"c": "{d: e}"}]}
    assert checked(Experiment, {"notes": notes, "data_root": "a/b.c"}, "") == {"notes": notes, "data_root": "a/b.c"}
    for settings in ({"notes": "a: b"}, {"held_out": ["a b", 1, 2]}, {"steps": "1, 2"}, {"steps": "[1]"}):
        with pytest.raises(ValueError, match=f"settings.{next(iter(settings))}: expected .*, got"):
            checked(Experiment, settings, "settings")


def test_an_objective_of_a_file_imports_nothing(evil: Path) -> None:
    """The arguments of Pyro's objectives have no annotations."""
    Experiment(objective=with_args("Trace_ELBO", strict_enumeration_warning=YAML_OF_A_CLASS))
    assert not evil.exists()


def test_a_number_is_not_read_from_a_text_whose_aliases_multiply() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(ValueError, match="num_features: expected a whole number"):
        pv.build(spec_with("address_guide", with_args("SimilarityGuide", num_features=bomb)))


@pytest.mark.parametrize("spec", ["some/file.yaml", ["a"], None])
def test_a_checkpoint_whose_spec_is_no_mapping_is_refused(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text(json.dumps(vectors().spec()))
    spec = str(tmp_path / "spec.json") if isinstance(spec, str) else spec  # it is not opened, though it is there
    save_checkpoint(tmp_path / "a", vectors().state_dict(), {"spec": spec})
    with pytest.raises(ValueError, match=r"path: the spec in .* is (str|list|NoneType), expected a mapping"):
        pv.load(tmp_path / "a")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_without_memory_for_its_weights(name: str, tmp_path: Path) -> None:
    vma = MODELS[name]()
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"spec": vma.spec()})
    with torch.device("meta"):
        weights = pv.build(vma.spec()).state_dict()
    assert {tensor.device.type for tensor in weights.values()} == {"meta"}
    for key, tensor in pv.load(tmp_path / "a").state_dict().items():
        assert torch.equal(tensor, vma.state_dict()[key])


def test_a_small_file_that_names_a_huge_model_takes_no_memory(tmp_path: Path) -> None:
    vma, spec = vectors(), vectors().spec()
    spec["init_args"]["latent_guide"]["init_args"]["hidden"] = [100_000, 10_000]  # 4 GB
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"spec": spec})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"tensors differ, the first is latent_guide\..*: expected \(.*\), found \("):
        pv.load(tmp_path / "a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


class Reads(FirstSlots):
    """A part that looks at a value while it is built."""

    def __init__(self) -> None:
        super().__init__(torch.ones(2).sum().item())


def test_a_part_that_reads_values_while_it_is_built_is_loaded_too(tmp_path: Path) -> None:
    vma = vectors(address_prior=Reads())
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"spec": vma.spec()})
    assert pv.load(tmp_path / "a").address_prior.rate == 2.0


def test_weights_are_fresh_and_no_seed_is_set() -> None:
    vma = vectors()
    one, two = pv.build(vma.spec()), pv.build(vma.spec())
    assert not torch.equal(one.address_guide.embed_memory.weight, two.address_guide.embed_memory.weight)


def choices(base: type[Part]) -> str:
    """The names that a message lists: those of this package, and those of other tests in this process."""
    names, below = set(), [base]
    while below:
        cls = below.pop()
        below += cls.__subclasses__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            names.add(cls.__name__)
    return f"Choices: {', '.join(sorted(names))}."


def with_args(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


GUIDE = "expected the name of an AddressGuide"
HOSTILE = [
    ("address_guide", with_args("os.system", command="true"), f"{GUIDE}, got 'os.system'. ", AddressGuide),
    (
        "likelihood",
        with_args("no_such_module.Payload"),
        "expected the name of a Likelihood, got 'no_such_module.Payload'. Module 'no_such_module' is not imported, and "
        "a spec imports none: import it first, or pass trusted_modules=['no_such_module']. ",
        pv.Likelihood,
    ),
    (
        "template_encoder",
        with_args("pyro_vmem.UniformPrior"),
        "expected the name of an Encoder, got 'pyro_vmem.UniformPrior', which is an AddressPrior. ",
        pv.parts.Encoder,
    ),
]
MISSPELT = [
    (
        "address_guide",
        "SimilarityGuied",
        f"{GUIDE}, got 'SimilarityGuied'. Did you mean 'SimilarityGuide'? ",
        AddressGuide,
    ),
    (
        "address_guide",
        with_args("SimilarityGuide", temprature=1.0),
        "SimilarityGuide has no argument 'temprature'. Did you mean 'temperature'? "
        "Its arguments: num_features, embed_dim, normalise, temperature, tied.",
        None,
    ),
    (
        "address_guide",
        {"class_path": "SimilarityGuide", "init_arg": {}},
        "expected class_path and init_args, got 'init_arg'. Did you mean 'init_args'?",
        None,
    ),
]
WRONG_TYPES = [
    ("address_guide", 5, f'{GUIDE}, or {{"class_path": ..., "init_args": {{...}}}}, got 5 (int). ', AddressGuide),
    (
        "address_guide.num_features",
        with_args("SimilarityGuide", num_features="six"),
        "expected a whole number in [1, 1,048,576], got 'six' (str).",
        None,
    ),
    (
        "latent_guide.hidden",
        with_args("GaussianGuide", hidden="wide"),
        "expected tuple[a whole number in [1, 1,048,576], ...], got 'wide' (str).",
        None,
    ),
]


@pytest.mark.parametrize(("place", "part", "message", "base"), [*HOSTILE, *MISSPELT, *WRONG_TYPES])
def test_messages(place: str, part: Any, message: str, base: type[Part] | None) -> None:
    with pytest.raises(ValueError, match=r"^spec\.") as caught:
        pv.build(spec_with(place.partition(".")[0], part))
    assert str(caught.value) == f"spec.{place}: {message}{choices(base) if base else ''}"


@pytest.mark.parametrize(
    ("role", "part", "message"),
    [
        ("address_guide", "UniformPrior", "got 'UniformPrior', which is an AddressPrior."),
        ("address_guide", "pyro_vmem.AddressGuide", "got 'pyro_vmem.AddressGuide'."),  # abstract
        ("address_guide", None, "spec.address_guide: expected the name"),
        ("address_guide", ["SimilarityGuide"], "spec.address_guide: expected the name"),
        ("address_guide", {"class_path": "SimilarityGuide", "init_args": [6]}, "spec.address_guide: expected the name"),
        (
            "address_guide",
            with_args("SimilarityGuide", normalise="cosin"),
            "normalise: expected 'memory' or 'cosine' or 'dot', got 'cosin' (str). Did you mean 'cosine'?",
        ),
        ("address_guide", with_args("SimilarityGuide", normalise=[]), "got [] (list)"),
        (
            "address_guide",
            with_args("SimilarityGuide", temperature=-1.0),
            "spec.address_guide.temperature: expected a positive number, got -1.0.",
        ),
        (
            "latent_guide",
            with_args("GaussianGuide", latent_dim=5),
            "spec.latent_guide: its latent_dim is 5, the latent",
        ),
        ("address_prior", with_args("Mute"), "spec.address_prior: not today"),
        (
            "template_encoder",
            with_args("ConvEncoder", image_shape=[28, 28]),
            "spec.template_encoder.image_shape: expected (channels, height, width), got (28, 28).",
        ),
        ("template_encoder", with_args("MLPEncoder"), "spec.template_encoder: MLPEncoder needs event_shape."),
        ("name", {"class_path": "UniformPrior"}, "spec.name: expected str, got {'class_path': 'UniformPrior'} (dict)."),
        ("no_such_part", "UniformPrior", "spec: VMA has no argument 'no_such_part'."),
        ("adress_prior", "UniformPrior", "Did you mean 'address_prior'?"),
    ],
)
def test_what_does_not_fit_is_refused(role: str, part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.build(spec_with(role, part))


class Mute(FirstSlots):
    def __init__(self) -> None:
        raise ValueError("not today")


def test_a_missing_part_is_named() -> None:
    missing = "address_prior, latent_prior, likelihood, address_guide, latent_guide"
    with pytest.raises(ValueError, match=rf"^spec: VMA needs {missing}\. Add what is missing\.$"):
        pv.build({})


@pytest.mark.parametrize("spec", [3, None, ["UniformPrior"], 2.5])
def test_a_spec_that_is_no_mapping_is_refused(spec: Any) -> None:
    with pytest.raises(ValueError, match=r"spec: expected Mapping\[str, Any\] or str or Path, got"):
        pv.build(spec)


@pytest.mark.parametrize(
    "class_path", ["os.system", "builtins.exec", "subprocess.check_output", "os", "no.such.module"]
)
@pytest.mark.parametrize("role", ["", "address_prior", "likelihood", "template_encoder", "name"])
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


@pytest.fixture
def module_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that leaves a file behind when it is imported, with a prior in one of its modules."""
    package, marker = tmp_path / "parts_of_a_user", tmp_path / "imported"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(marker)!r}, 'w').close()")
    (package / "priors.py").write_text("import pyro_vmem\n\nclass Theirs(pyro_vmem.UniformPrior):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield marker
    for name in [name for name in sys.modules if name.partition(".")[0] == "parts_of_a_user"]:
        del sys.modules[name]


def test_a_module_is_imported_only_if_it_is_trusted(module_of_a_user: Path, tmp_path: Path) -> None:
    spec = spec_with("address_prior", "parts_of_a_user.priors.Theirs")
    for trusted in ([], ["parts"], ["parts_of_a_user.priors.Theirs"], ["os"]):
        with pytest.raises(ValueError, match=r"'parts_of_a_user.priors' is not imported.*\['parts_of_a_user'\]"):
            pv.build(spec, trusted_modules=trusted)
        assert not module_of_a_user.exists()
        assert "parts_of_a_user" not in sys.modules
    vma = pv.build(spec, trusted_modules=["parts_of_a_user"])
    assert type(vma.address_prior).__name__ == "Theirs"
    assert module_of_a_user.exists()
    assert type(pv.build(spec).address_prior) is type(vma.address_prior)  # now that it is imported
    with pytest.raises(ValueError, match=r"there is no module 'parts_of_a_user.prior', which"):
        pv.build(spec_with("address_prior", "parts_of_a_user.prior.Theirs"), ["parts_of_a_user"])
    with pytest.raises(ValueError, match=r"trusted_modules: expected Sequence\[str\], got 'os'"):
        pv.build(spec, trusted_modules="os")
    save_checkpoint(tmp_path / "a", vma.state_dict(), {"spec": vma.spec()})
    assert pv.load(tmp_path / "a", trusted_modules=["parts_of_a_user"]).spec() == vma.spec()


def test_a_module_that_loads_itself_when_it_is_asked_is_not_asked() -> None:
    class Lazy(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError("it was asked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lazy_of_test_build", Lazy("lazy_of_test_build"))
        with pytest.raises(ValueError, match="expected the name of an AddressPrior"):
            pv.build(spec_with("address_prior", "lazy_of_test_build.UniformPrior"))


def test_a_file_that_contains_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("address_guide: &g {class_path: TruncatedGuide, init_args: {inner: *g}}")
    with pytest.raises(ValueError, match=r"model.yaml' is not valid .yaml \(it has more than 100,000 values"):
        pv.build(path)
    spec = yaml.safe_load(path.read_text())
    with pytest.raises(ValueError, match="nested too deeply"):
        pv.build(vectors().spec()["init_args"] | spec)


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    """Thirty lines that stand for 2 ** 30 values."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="it has more than 100,000 values, its aliases followed"):
        pv.build(path)
    with pytest.raises(ValueError, match="has no argument 'a0'") as caught:
        pv.build(vectors().spec()["init_args"] | yaml.safe_load(path.read_text()))
    with pytest.raises(ValueError, match="address_prior: expected the name of"):
        pv.build(spec_with("address_prior", yaml.safe_load(path.read_text())["a29"]))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name: a", "name: b"], "it has the key 'name' twice"),
        (["a: " + "[" * 3000], "it is nested too deeply"),
        (
            ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9))],
            "it has more than 100,000 values, its aliases followed",
        ),
        (["? [a]", ": b"], "unhashable"),
    ],
)
def test_a_yaml_file_that_costs_more_than_it_holds(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(message)):
        pv.build(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"settings": {"name": 1, "name": 2}}', "it has the key 'name' twice"),
        ("[" * 200_000, "it is nested too deeply"),
    ],
)
def test_a_json_file_with_a_key_twice_or_too_deep(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text(text)
    for read in (pv.build, lambda path: Experiment.read(path.parent)):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "experiment.json")


def test_numbers_in_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    for text in ("1e-3", "1.0e-3", "1.e-3", ".1e-2", "0.001", "+1E-3"):
        path.write_text(yaml.safe_dump(vectors().spec()).replace("temperature: 0.1", f"temperature: {text}"))
        assert pv.build(path).address_guide.temperature.item() == pytest.approx(1e-3), text


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


OWN_GUIDE = """
import torch, pyro_vmem as pv

class NearestGuide(pv.AddressGuide):
    def __init__(self, sharpness: float = 1.0):
        super().__init__()
        self.sharpness = torch.nn.Parameter(torch.tensor(sharpness))

    def forward(self, memory, x):
        distance = (x.features.unsqueeze(-2) - memory.features).square().sum(-1)
        return pv.over_slots(-self.sharpness * distance, memory)

train, test = pv.data.glyphs(size=12).split(by="alphabet", test=0.2, seed=0)
spec = pv.VMA.for_images((1, 12, 12), latent_dim=4, width=4).spec()["init_args"]
vma = pv.build(spec | {"address_guide": {"class_path": "NearestGuide", "init_args": {"sharpness": 0.5}}})
result = pv.fit(vma, pv.data.EpisodeSampler(train, n_way=4), steps=3, progress=False)
"""


def test_a_guide_of_ones_own_in_15_lines() -> None:
    """What the documentation shows: written in a notebook, named in a spec, trained."""
    pytest.importorskip("matplotlib")
    assert len([line for line in OWN_GUIDE.splitlines() if line]) <= 15
    notebook: dict[str, Any] = {"__name__": "__main__"}  # as IPython has it; this is not the module of that name
    exec(OWN_GUIDE, notebook)
    vma, result = notebook["vma"], notebook["result"]
    assert type(vma.address_guide) is notebook["NearestGuide"]
    assert result.steps == 3
    assert vma.address_guide.sharpness.item() != 0.5
    assert vma.spec()["init_args"]["address_guide"] == with_args("__main__.NearestGuide", sharpness=0.5)
    assert pv.build(vma.spec()).spec() == vma.spec()
