"""Figures of diagnostics: what is drawn is what the numbers say."""

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from pyro_vmem import plots


def axes() -> Axes:
    return Figure(layout="constrained").subplots()


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def lookup(figure, target, templates, probabilities, correct, max_slots=8, exact=None):
    """One lookup, with the classes 1 for correct templates and 0 for others."""
    rows = None if exact is None else exact[None]
    labels = correct.long(), torch.ones(1, dtype=torch.long)
    return plots.lookups(figure, target[None], templates, probabilities[None], *labels, max_slots, rows)


class TestLookupsWithTheExactPosterior:
    m = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    q, p = torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.9, 0.08, 0.02])

    def test_second_bar_is_the_exact_posterior_of_the_same_slot(self) -> None:
        figure = lookup(Figure(), self.m[0], self.m, self.q, torch.tensor([False, True, False]), exact=self.p)
        containers = figure.axes[0].containers
        tracks, guide, _, exact = ([bar.get_width() for bar in c] for c in containers[2:])  # after two of the key
        assert tracks == [1, 1, 1]
        assert guide == pytest.approx([0.7, 0.2, 0.1])
        assert exact == pytest.approx([0.08, 0.9, 0.02])
        assert [text.get_text() for text in figure.axes[0].texts][2:5] == ["right class", "guide", "exact"]

    def test_refuses_another_shape(self) -> None:
        with pytest.raises(ValueError, match=r"exact: expected shape \(1, 3\) as probabilities, got \(1, 2\)"):
            lookup(Figure(), self.m[0], self.m, self.q, torch.zeros(3), exact=self.p[:2])


class TestAddressHeatMap:
    labels, targets = torch.tensor([5, 3, 5, 4]), torch.tensor([5, 3, 9])
    q = torch.arange(12.0).reshape(3, 4) / 12

    def test_rows_and_columns_are_sorted_by_class(self) -> None:
        ax = axes()
        assert plots.address_heat_map(ax, self.q, self.labels, self.targets) is ax
        expected = self.q[[1, 0, 2]][:, [1, 3, 0, 2]]
        np.testing.assert_allclose(ax.images[0].get_array(), expected)
        assert ax.images[0].get_clim() == (0, 1)  # so that two guides can be compared
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("4 slots, by class", "3 targets, by class")

    def test_frames_hold_the_right_slots(self) -> None:
        ax = plots.address_heat_map(axes(), self.q, self.labels, self.targets)
        boxes = sorted((*line.get_xydata().min(0), *line.get_xydata().max(0)) for line in ax.lines)
        assert boxes == [(-0.5, -0.5, 0.5, 0.5), (1.5, 0.5, 3.5, 1.5)]  # class 3 once, class 5 twice, 4 and 9 not

    def test_refuses_labels_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"probabilities: expected shape \(3, 3\)"):
            plots.address_heat_map(axes(), self.q, self.labels[:3], self.targets)


class TestInformationGainAgainstSlots:
    def test_points_are_in_order_below_the_most_there_is(self) -> None:
        ax = plots.information_gain_against_slots(axes(), [64, 4, 16], [3.0, 1.0, 2.0], exact=[3.5, 1.2, 2.4])
        most, exact, guide = ax.lines[:3]
        np.testing.assert_allclose(most.get_xydata(), [[4, math.log(4)], [16, math.log(16)], [64, math.log(64)]])
        assert exact.get_ydata().tolist() == [1.2, 2.4, 3.5]
        assert guide.get_xydata().tolist() == [[4, 1], [16, 2], [64, 3]]
        assert [label.get_text() for label in ax.get_xticklabels()] == ["4", "16", "64"]
        assert legend(ax) == ["log |M|", "exact p(a | x, M)", "guide q(a | M, x)"]
        assert "nats" in ax.get_ylabel()

    def test_bars_are_the_errors(self) -> None:
        ax = plots.information_gain_against_slots(axes(), [4, 16], torch.tensor([1.0, 2.0]), np.array([0.1, 0.3]))
        bars = ax.containers[0].lines[2][0].get_segments()
        np.testing.assert_allclose([bar[:, 1] for bar in bars], [[0.9, 1.1], [1.7, 2.3]])

    def test_refuses_lengths_that_differ_and_empty_memories(self) -> None:
        with pytest.raises(ValueError, match=r"error: expected one value for each of the memories \(2,\), got \(1,\)"):
            plots.information_gain_against_slots(axes(), [4, 16], [1.0, 2.0], [0.1])
        with pytest.raises(ValueError, match=r"num_slots: expected at least 1, got 0"):
            plots.information_gain_against_slots(axes(), [0, 16], [1.0, 2.0])


class TestEvidenceByMemory:
    right, wrong = torch.tensor([-100.0, -90.0]), torch.tensor([-125.0, -109.0])

    def test_means_errors_and_what_is_lost(self) -> None:
        ax = plots.evidence_by_memory(axes(), {"right": self.right, "wrong": self.wrong})
        assert [text.get_text() for text in ax.texts] == ["\N{MINUS SIGN}95.0 nats", "22.0 nats less"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["right", "wrong"]
        (bar,) = ax.containers[1].lines[2][0].get_segments()
        assert bar[:, 0].tolist() == [-125.0, -109.0]  # 117 with a standard error of 8
        assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the right one on top

    def test_one_datapoint_and_a_memory_that_is_better(self) -> None:
        ax = plots.evidence_by_memory(axes(), {"right": self.right[:1], "wrong": self.right[1:]})
        assert ax.texts[1].get_text() == "10.0 nats more"

    def test_refuses_nothing(self) -> None:
        with pytest.raises(ValueError, match="evidence: expected at least one memory"):
            plots.evidence_by_memory(axes(), {})


class TestKhat:
    def test_above_the_line_differs_in_colour_and_mark(self) -> None:
        ax = plots.khat_scatter(axes(), torch.tensor([[0.1, 0.9], [-math.inf, 0.7]], dtype=torch.float64))
        good, bad = ax.collections
        assert good.get_offsets()[:, 0].tolist() == [0, 2, 3]
        assert bad.get_offsets().tolist() == [[1, pytest.approx(0.9)]]
        assert len(good.get_paths()[0]) != len(bad.get_paths()[0])
        assert ax.lines[0].get_ydata()[0] == 0.7

    @pytest.mark.parametrize(("largest", "top"), [(0.3, 1.5), (2.5, 2.5), (9.0, 4.0)])
    def test_range_is_that_of_the_values_within_reason(self, largest, top) -> None:
        ax = plots.khat_scatter(axes(), torch.tensor([0.1, largest, math.inf]))
        assert ax.get_ylim()[1] == pytest.approx(top + 0.1)
        assert ax.collections[1].get_offsets()[-1, 1] == pytest.approx(top)

    def test_everything_that_was_estimated_is_inside(self) -> None:
        ax = plots.khat_scatter(axes(), torch.tensor([-math.inf, -3.0, 7.0, math.inf, math.nan]))
        low, high = ax.get_ylim()
        heights = np.concatenate([c.get_offsets()[:, 1] for c in ax.collections])
        assert len(heights) == 4
        assert ((heights > low) & (heights < high)).all()
        assert legend(ax) == ["2 to be trusted", "2 above 0.7", "1 not estimated"]


class TestReliability:
    confidence, accuracy = torch.tensor([0.05, 0.4, 0.9]), torch.tensor([0.0, 0.5, 0.8])
    count = torch.tensor([0, 10, 30])

    def test_points_are_the_bins_that_hold_something(self) -> None:
        ax = plots.reliability_diagram(axes(), self.confidence, self.accuracy, self.count)
        points = ax.collections[-1]
        np.testing.assert_allclose(points.get_offsets(), [[0.4, 0.5], [0.9, 0.8]], rtol=1e-6)
        small, large = points.get_sizes() - 20
        assert large / small == pytest.approx(3)
        assert legend(ax) == ["calibrated", "calibration error 0.10"]

    def test_gaps_reach_from_the_point_to_the_diagonal(self) -> None:
        ax = plots.reliability_diagram(axes(), self.confidence, self.accuracy, self.count)
        gaps = ax.collections[0].get_segments()
        np.testing.assert_allclose(gaps, [[[0.4, 0.4], [0.4, 0.5]], [[0.9, 0.8], [0.9, 0.9]]], rtol=1e-6)

    def test_refuses_empty_bins_only(self) -> None:
        with pytest.raises(ValueError, match="count: expected one value per bin, not all 0"):
            plots.reliability_diagram(axes(), self.confidence, self.accuracy, 0 * self.count)


class TestSbc:
    def test_every_rank_is_counted_once_in_whole_bins(self) -> None:
        figure = plots.sbc_histograms(Figure(), {"z": torch.arange(12), "a": torch.zeros(12)}, num_draws=11, bins=5)
        z, a = figure.axes
        assert [bar.get_height() for bar in z.containers[-1]] == [2, 3, 2, 3, 2]  # 12 ranks in 5 bins
        assert [bar.get_height() for bar in a.containers[-1]] == [12, 0, 0, 0, 0]
        (expected,) = [patch for patch in z.patches if isinstance(patch, StepPatch)]
        assert expected.get_data().values == pytest.approx([2, 3, 2, 3, 2])  # what uniform ranks count
        assert [ax.get_title() for ax in figure.axes] == ["z", "a"]
        assert z.get_ylim() == a.get_ylim()

    def test_band_holds_99_percent_of_a_binomial_count(self) -> None:
        figure = plots.sbc_histograms(Figure(), {"z": torch.arange(400) % 20}, num_draws=19)
        band = figure.axes[0].containers[0][0]
        low, high = band.get_y(), band.get_y() + band.get_height()
        draws = np.random.default_rng(0).binomial(400, 1 / 20, size=200_000)
        below, above = (draws < low).mean(), (draws > high).mean()
        assert max(below, above) < 0.005 + 0.001  # of which the second part is noise, 6 standard errors
        assert (draws < low + 1).mean() > 0.005 - 0.001  # a band that is narrower by one would hold less
        assert (draws > high - 1).mean() > 0.005 - 0.001

    def test_panels_without_a_quantity_are_empty(self) -> None:
        figure = plots.sbc_histograms(Figure(), {f"z[{i}]": torch.arange(5) for i in range(5)}, num_draws=4)
        assert [ax.axison for ax in figure.axes] == [True] * 5 + [False] * 3
        assert figure.axes[1].get_xlabel() == "rank among 4 draws"  # nothing is drawn below it

    @pytest.mark.parametrize("ranks", [torch.tensor([0, 10]), torch.tensor([-1]), torch.zeros(0)])
    def test_refuses_what_is_no_rank(self, ranks) -> None:
        with pytest.raises(ValueError, match="ranks: expected 0 to num_draws = 9 for 'z'"):
            plots.sbc_histograms(Figure(), {"z": ranks}, num_draws=9)

    def test_refuses_nothing(self) -> None:
        with pytest.raises(ValueError, match="ranks: expected at least one quantity"):
            plots.sbc_histograms(Figure(), {}, num_draws=9)


class TestCompletions:
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    samples = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def test_target_then_what_was_seen_then_what_was_filled_in(self) -> None:
        seen = torch.tensor([True, True, False, False])[:, None]
        figure = plots.completions(Figure(), self.x, seen, self.samples)
        drawn = [np.asarray(image.get_array()) for image in figure.axes[0].images]
        assert len(drawn) == 2 * 5
        for row in range(2):
            target, observed, *filled = drawn[5 * row : 5 * row + 5]
            np.testing.assert_allclose(target[..., 0], 1 - self.x[row, 0], rtol=1e-6)
            np.testing.assert_array_equal(observed[:2], target[:2])
            assert len(np.unique(observed[2:].reshape(-1, 3), axis=0)) == 1  # neither ink nor paper
            assert not np.isin(observed[2, 0], [0, 1]).any()
            for got, source in zip(filled, self.samples[row], strict=True):
                np.testing.assert_allclose(got[..., 0], 1 - source[0], rtol=1e-6)

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"samples: expected shape .* with R = 2"):
            plots.completions(Figure(), self.x, torch.tensor(True), self.samples[:1])
        with pytest.raises(ValueError, match=r"mask: \(3,\) does not broadcast with targets \(2, 1, 4, 4\)"):
            plots.completions(Figure(), self.x, torch.tensor([True] * 3), self.samples)
