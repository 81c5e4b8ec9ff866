"""An experiment as plain data: what its settings stand for, what is refused, and that it can be written out."""

from __future__ import annotations

import functools
import json
from typing import Any, get_args

import pytest
import torch
import yaml

import pyro_vmem as pv
from pyro_vmem.app import Experiment, cli
from pyro_vmem.infer.by_name import Objective, named_objective
from pyro_vmem.train.schedules import Constant, LinearRise, WarmupCosine

BOMB = "notes:\n  a0: &a0 [x, x]\n" + "".join(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
NAMES = [name for name in get_args(Objective) if name != "auto"]


def args(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def settings_of(elbo: Any) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(elbo).items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_is_the_objective_of_that_name(name: Any) -> None:
    made, expected = Experiment(objective=name).made_objective(), named_objective(name)
    assert type(made) is type(expected)
    assert settings_of(made) == settings_of(expected)


def test_a_short_name_may_have_some_arguments_of_its_own() -> None:
    made: Any = Experiment(objective=args("rws", num_particles=8, defensive=0.5)).made_objective()
    assert settings_of(made) == settings_of(
        pv.infer.RWS_ELBO(8, pathwise=True, defensive=0.5, max_plate_nesting=1)  # pathwise, as the name has it
    )


def test_settings_of_training_are_specs() -> None:
    config = Experiment(
        lr=1e-2,
        optimizer=args("AdamW", weight_decay=0.01),
        schedule=args("WarmupCosine", warmup=7),
        kl_schedule="Constant",
        clip_norm=3.0,
        seed=5,
    ).config()
    assert (config.lr, config.clip_norm, config.seed) == (1e-2, 3.0, 5)
    assert (config.schedule, config.kl_schedule) == (WarmupCosine(7), Constant())
    optimizer = config.optimizer([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.01
    default = Experiment().config()
    assert default == pv.TrainingConfig(optimizer=default.optimizer)
    assert isinstance(default.optimizer, functools.partial)
    assert (default.optimizer.func, default.optimizer.keywords) == (torch.optim.Adam, {})
    scheduler: Any = Experiment(schedule=args("StepLR", step_size=3)).config().schedule
    assert scheduler(optimizer).step_size == 3


@pytest.mark.parametrize("name", sorted(n for n in pv.infer.__all__ if n.endswith("_ELBO")))
def test_each_objective_is_known_by_its_class(name: str) -> None:
    given = {"local": args("VIMCO_ELBO", num_particles=3)} if name == "GlobalDraws_ELBO" else {}
    made: Any = Experiment(objective=args(name, **given)).made_objective()
    again: Any = Experiment(**Experiment(objective=args(name, **given)).written_out()).made_objective()
    assert type(made).__name__ == name
    assert repr(made) == repr(again)


@pytest.mark.parametrize("objective", [*NAMES, "auto", args("RWS_ELBO", defensive=0.5), "Trace_ELBO"])
def test_what_is_written_out_stands_for_the_same(objective: Any) -> None:
    one = Experiment(
        objective=objective, optimizer=args("SGD", momentum=0.9), kl_schedule=args("LinearRise", start=0.3)
    )
    written = json.loads(json.dumps(one.written_out()))
    two = Experiment(**written)
    assert two.written_out() == one.written_out()
    assert settings_of(two.made_objective()) == settings_of(one.made_objective()) if objective != "auto" else True
    assert two.config().kl_schedule == LinearRise(0.3, 0.5)
    assert two.config().optimizer.keywords["momentum"] == 0.9  # type: ignore[attr-defined]


def test_print_config_shows_all_arguments_and_is_read_again(tmp_path: Any, capsys: Any) -> None:
    words = "train --objective RWS_ELBO --objective.defensive 0.5 --optimizer AdamW --optimizer.weight_decay 0.01"
    words += " --schedule WarmupCosine --schedule.warmup 200 --address_guide TruncatedGuide --address_guide.k 16"
    assert cli.main([*words.split(), "--print_config"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert shown["objective"]["class_path"] == "pyro_vmem.infer.RWS_ELBO"
    assert shown["objective"]["init_args"].items() >= {"num_particles": 4, "defensive": 0.5, "top": None}.items()
    assert shown["optimizer"]["init_args"].items() >= {"weight_decay": 0.01, "betas": [0.9, 0.999]}.items()
    assert shown["schedule"] == args("pyro_vmem.train.WarmupCosine", warmup=200)
    assert shown["kl_schedule"] == args("pyro_vmem.train.LinearRise", start=0.1, share=0.5)
    (tmp_path / "run.yaml").write_text(text)
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values"),
        ("address_guide: &g {class_path: TruncatedGuide, init_args: {k: 2, inner: *g}}", "more than 100,000 values"),
        ("notes: !!python/object/apply:os.system [touch owned]", "could not determine a constructor"),
    ],
    ids=["aliases that multiply", "contains itself", "runs something"],
)
def test_a_hostile_file_is_refused_at_once(
    text: str, message: str, tmp_path: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    for words in (["--config", "run.yaml"], ["--config=run.yaml"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *words, "--out", "run", "--steps", "1"])
        said = capsys.readouterr().err
        assert "train: --config: not valid YAML: " in said
        assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_value_whose_aliases_multiply_is_refused_at_once(capsys: Any) -> None:
    for words in (["--notes", BOMB.removeprefix("notes:\n")], ["--config", BOMB]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *words, "--print_config"])
        assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "vimko"}, r"objective: expected the name of an objective, got 'vimko'. Did you mean 'vimco'\?"),
        ({"objective": args("auto", k=1)}, "objective: 'auto' takes no arguments"),
        ({"objective": args("vimco", particles=3)}, "objective: VIMCO_ELBO has no argument 'particles'"),
        ({"objective": 3}, "objective: expected the name of an ELBO"),
        ({"objective": args("os.system", command="true")}, "objective: expected the name of an ELBO, got 'os.system'"),
        ({"optimizer": "Adan"}, r"optimizer: expected the name of an Optimizer, got 'Adan'. Did you mean 'Adam'\?"),
        ({"optimizer": args("Adam", lr=0.1)}, "optimizer: Adam has no argument 'lr'"),
        ({"schedule": args("WarmupCosine", warmup=-3)}, "schedule.warmup: expected a whole number"),
        ({"schedule": args("StepLR")}, "schedule: StepLR needs step_size"),
        ({"kl_schedule": "StepLR"}, "kl_schedule: expected the name of a Schedule, got 'StepLR'"),
        ({"only": "adress_guide"}, r"only: expected one of .* Did you mean 'address_guide'\?"),
        ({"steps": 0}, "steps: expected a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "it holds list, expected a mapping"),
        ('{"stepz": 3}', r"has no argument 'stepz'. Did you mean 'steps'\?"),
        ('{"steps": "many"}', r"settings.steps: expected a whole number, got 'many' \(str\)"),
        ('{"pixels": "casual"}', r"got 'casual' \(str\). Did you mean 'causal'\?"),
        ('{"objective": {"class_path": "os.system"}}', "got 'os.system'"),
        ("{", "does not hold the settings of a run"),
    ],
)
def test_a_file_of_settings_that_do_not_fit_is_refused(text: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Experiment.read(tmp_path)


def test_a_part_like_another_models_leaves_that_model_as_it_is() -> None:
    vma = pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4, ink=0.2)
    spec, before = vma.spec(), {name: tensor.clone() for name, tensor in vma.state_dict().items()}
    pv.build({"likelihood": "BernoulliDecoder", "address_guide": args("TruncatedGuide", k=2)}, like=vma)
    pv.build({"likelihood": "GaussianDecoder"}, like=vma)
    assert vma.spec() == spec
    assert before.keys() == vma.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in vma.state_dict().items())


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state() -> None:
    episode = pv.data.Episode(pv.Memory(torch.rand(4, 1, 8, 8)), torch.rand(2, 1, 8, 8), torch.zeros(2).long())
    experiment = Experiment(latent_dim=4, num_features=16, width=4, seed=3)
    torch.manual_seed(1)
    one = experiment.new_model(episode).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    two = experiment.new_model(episode).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
