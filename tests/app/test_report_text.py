"""Numbers in words: what is said when they are good, and when they are bad."""

import math

import pytest

from pyro_vmem.app.report_text import (
    DIAGNOSTICS,
    IGNORED_SHARE,
    LEAST_WORTH,
    QUANTITIES,
    diagnostic_rows,
    problems,
    result_rows,
    speed_sentence,
    verdict,
)

METRICS = {
    **{"nll": 98.31, "nll_se": 0.42, "nll_wrong_memory": 115.53, "nll_wrong_memory_se": 0.61},
    **{"memory_worth_nats": 17.22, "memory_worth_nats_se": 0.53},
    **{"information_gain": 2.41, "information_gain_se": 0.03},
    **{"information_gain_exact": 2.74, "information_gain_exact_se": 0.02},
    **{"hit_rate": 0.712, "hit_rate_se": 0.021, "hit_rate_exact": 0.803, "hit_rate_exact_se": 0.018},
    **{"chance": 0.05, "n_way": 20, "k_shot": 1, "num_samples": 10, "num_episodes": 20, "num_targets": 400},
    "error_unknown": 0.0,
}


def test_good() -> None:
    assert verdict(METRICS) == (
        "With 20 unseen characters in memory, the right one is found 71 % of the time (chance 5 %); the lookup "
        "gains 2.4 of 3.0 nats, and the memory is worth 17.2 nats per image."
    )


def test_evidence_that_cannot_be_relied_on_is_said() -> None:
    assert verdict(METRICS | {"error_unknown": 0.05}) == verdict(METRICS)
    assert verdict(METRICS | {"error_unknown": 0.96}) == (
        "With 20 unseen characters in memory, the right one is found 71 % of the time (chance 5 %); the lookup "
        "gains 2.4 of 3.0 nats. What the memory is worth is not stated: for 96 % of the images the error of the "
        "evidence is unknown."
    )


def test_the_table_states_no_worth_that_the_verdict_does_not_state() -> None:
    known = dict(row[:2] for row in result_rows(METRICS))
    unknown = dict(row[:2] for row in result_rows(METRICS | {"error_unknown": 0.06}))
    assert known["Worth of the memory"] == "17.2 ± 0.5 nats"
    assert unknown["Worth of the memory"] == "not stated"
    assert {name: value for name, value in unknown.items() if name != "Worth of the memory"}.items() <= known.items()
    assert problems(METRICS | {"error_unknown": 0.06, "memory_worth_nats": 0.0}) == []


def test_evidence_of_an_error_that_was_not_measured_is_not_relied_on() -> None:
    assert "is not stated" in verdict({name: value for name, value in METRICS.items() if name != "error_unknown"})


def test_guide_ignores_the_target() -> None:
    text = verdict(METRICS | {"information_gain": 0.14, "hit_rate": 0.06})
    assert text == (
        "The address guide ignores the target: its lookups gain 0.14 of 3.0 nats. With 20 unseen characters "
        "in memory, the right one is found 6 % of the time (chance 5 %), which is not clearly better than "
        "guessing. The memory is worth 17.2 nats per image."
    )


def test_a_guide_that_always_looks_at_the_same_slot_ignores_the_target() -> None:
    """It gains log |M|, none of which tells one target from another."""
    text = verdict(METRICS | {"information_gain": 2.99, "mutual_information": 0.01})
    assert text.startswith("The address guide ignores the target: it looks up the same slots whatever the target is. ")


@pytest.mark.parametrize("name", ["information_gain", "mutual_information"])
def test_edge_of_ignoring(name) -> None:
    assert IGNORED_SHARE == 0.05
    edge = IGNORED_SHARE * math.log(20)
    assert any("ignores the target" in said for said in problems(METRICS | {name: edge - 1e-6}))
    assert problems(METRICS | {name: edge + 1e-6}) == []


@pytest.mark.parametrize(
    ("worth", "error", "says"),
    [
        (-0.4, 0.2, "The memory is not used: right templates are worth \N{MINUS SIGN}0.4 nats per image"),
        (0.9, 0.4, "The memory is not used: right templates are worth 0.9 nats per image"),
        (0.9, 0.1, "The memory is hardly used: right templates are worth 0.9 nats per image"),
        (5.0, 1.7, "The memory is not shown to be used: it is worth 5.0 ± 1.7 nats per image, less than 3 "),
        (5.0, math.nan, "The memory seems worth 5.0 nats per image, but one episode gives no standard error."),
    ],
)
def test_memory_not_used(worth, error, says) -> None:
    text = verdict(METRICS | {"memory_worth_nats": worth, "memory_worth_nats_se": error})
    assert says in text
    assert "the memory is worth" not in text


def test_edge_of_use() -> None:
    assert LEAST_WORTH == 1.0
    below = METRICS | {"memory_worth_nats": 1.0 - 1e-6, "memory_worth_nats_se": 0.3}
    assert problems(below)[0].startswith("The memory is hardly used")
    assert "and the memory is worth 1.0" in verdict(METRICS | {"memory_worth_nats": 1.0, "memory_worth_nats_se": 0.3})


def test_both_bad_are_said_first() -> None:
    bad = METRICS | {"information_gain": 0.0, "memory_worth_nats": 0.0}
    text = verdict(bad)
    assert len(problems(bad)) == 2
    assert text.startswith("The address guide ignores the target: ")
    assert text.index("The memory is not used: ") < text.index("With 20 unseen characters")
    assert text.endswith("(chance 5 %).")


def test_what_is_wrong_with_the_memory_is_said_before_what_is_right() -> None:
    text = verdict(METRICS | {"memory_worth_nats": 0.0})
    assert text.startswith("The memory is not used: ")
    assert text.endswith("the lookup gains 2.4 of 3.0 nats.")


def test_confident_but_wrong() -> None:
    assert "not clearly better than guessing" in verdict(METRICS | {"hit_rate": 0.11, "hit_rate_se": 0.021})
    assert "guessing" not in verdict(METRICS | {"hit_rate": 0.12, "hit_rate_se": 0.021})


def test_several_shots() -> None:
    text = verdict(METRICS | {"k_shot": 5, "information_gain": 4.0})
    assert text.startswith("With 20 unseen characters in memory, 5 examples each, the right one")
    assert "gains 4.0 nats (the class takes 3.0, the slot 4.6)" in text


def test_one_class_has_nothing_to_look_up() -> None:
    one = {"n_way": 1, "chance": 1.0, "information_gain": 0.0, "hit_rate": 1.0, "hit_rate_se": 0.0}
    assert problems(METRICS | one) == []
    text = verdict(METRICS | one)
    assert text == (
        "With one unseen character in memory there is no class to look up. The memory is worth 17.2 nats per image."
    )


def test_rows_name_every_quantity_with_error_unit_and_meaning() -> None:
    rows = {name: (value, meaning) for name, value, meaning in result_rows(METRICS)}
    assert len(rows) == len(QUANTITIES)
    assert rows["NLL"][0] == "98.3 ± 0.4 nats"
    assert "from 10 samples of z per slot" in rows["NLL"][1]
    assert rows["Information gain"][0] == "2.41 ± 0.03 nats\n3.48 bits\n80 % of log |M|"
    assert rows["Accuracy"][0] == "71.2 ± 2.1 %\nchance 5 %"


def test_missing_metrics_are_named() -> None:
    with pytest.raises(ValueError, match=r"metrics: \['nll_se'\] are missing"):
        result_rows({name: value for name, value in METRICS.items() if name != "nll_se"})


COUNTS = {"n_way": 20, "k_shot": 2, "num_samples": 10}


class TestDiagnosticRows:
    def test_every_row_there_can_be(self) -> None:
        metrics = COUNTS | {key: 0.1234 for key, *_ in DIAGNOSTICS} | {"kl_z_se": 0.5, "top5_rate_se": 0.05}
        rows = {name: (value, meaning) for name, value, meaning in diagnostic_rows(metrics)}
        assert len(rows) == len(DIAGNOSTICS)
        assert rows["KL(z)"][0] == "0.1 ± 0.5 nats"
        assert rows["Top-5 accuracy"][0] == "12.3 ± 5.0 %"
        assert rows["Calibration error"][0] == "0.123"
        assert rows["Effective samples"][1].endswith("of 400 decoder passes at 40 slots.")

    def test_what_was_not_measured_has_no_row(self) -> None:
        metrics = COUNTS | {"kl_z": 1.0, "top5_rate": math.nan}
        assert [name for name, _, _ in diagnostic_rows(metrics)] == ["KL(z)"]


def test_speed_in_a_sentence() -> None:
    metrics = {"evaluation_seconds": 25.4, "decodes": 160_000, "decodes_per_second": 6400.0}
    assert speed_sentence(metrics) == "The evaluation took 25 s for 160,000 decoder passes, 6,400 per second."
