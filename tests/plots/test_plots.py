"""Figures: what they draw, and that they touch nothing else."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from pyro_vmem import plots
from pyro_vmem.plots._style import BLUE, GREEN, MID_TONE, ORANGE, PURPLE

HISTORY = [
    {"step": 500, "seconds": 5.0, "bound": -120.0, "kl_a": 1.0},
    {"step": 1000, "seconds": 9.0, "bound": -110.0, "kl_a": 2.0, "val_bound": -115.0},
    {"step": 1500, "seconds": 14.0, "bound": -105.0, "kl_a": 2.5},
    {"step": 2000, "seconds": 18.0, "bound": -100.0, "kl_a": 2.6, "val_bound": -104.0},
]


def axes() -> Axes:
    return Figure(layout="constrained").subplots()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def pictures(rows: int, channels: int = 1, height: int = 6, width: int = 6) -> torch.Tensor:
    return torch.rand(rows, channels, height, width, generator=torch.Generator().manual_seed(0))


M, FIVE = pictures(5), torch.arange(5)
Q = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05], [0.6, 0.1, 0.1, 0.1, 0.1]])
TWO, SAMPLES = torch.tensor([1, 4]), M[:4].reshape(2, 2, 1, 6, 6)
GAINS = torch.rand(30, generator=torch.Generator().manual_seed(0))

RELATIONS = {
    "sample_sample": {"a": [], "z": ["a"], "x": ["a", "z"]},
    "plate_sample": {"data": ["a", "z", "x"]},
    "observed": ["x"],
}

# One of each; a function draws it.
DRAW: dict[str, Callable[[], Any]] = {
    "learning_curves": lambda: plots.learning_curves(axes(), HISTORY, ["bound", "val_bound", "kl_a"]),
    "images": lambda: plots.images(axes(), M),
    "graphical_model": lambda: plots.graphical_model(axes(), RELATIONS, ["M"]),
    "information_gain_histogram": lambda: plots.information_gain_histogram(axes(), GAINS, 5, 5, GAINS),
    "information_gain_against_slots": lambda: plots.information_gain_against_slots(
        axes(), [4, 16, 64], [1.0, 2.0, 3.0], [0.1] * 3, [1.2, 2.4, 3.5]
    ),
    "evidence_by_memory": lambda: plots.evidence_by_memory(axes(), {"right": -GAINS, "wrong": -9 * GAINS}),
    "khat_scatter": lambda: plots.khat_scatter(axes(), torch.tensor([0.1, 0.9, math.inf, math.nan])),
    "reliability_diagram": lambda: plots.reliability_diagram(
        axes(), torch.tensor([0.2, 0.7]), torch.tensor([0.3, 0.9]), torch.tensor([5, 9])
    ),
    "address_heat_map": lambda: plots.address_heat_map(axes(), Q, FIVE, TWO),
    "lookups": lambda: plots.lookups(Figure(), M[:2], M, Q, FIVE, TWO, exact=Q.flip(0)),
    "one_shot_generations": lambda: plots.one_shot_generations(Figure(), M[:2], SAMPLES),
    "completions": lambda: plots.completions(Figure(), M[:2], torch.arange(6) < 3, SAMPLES),
    "sbc_histograms": lambda: plots.sbc_histograms(
        Figure(layout="constrained"), {"z[0]": torch.arange(99) % 10, "a": torch.arange(99) % 9}, 9
    ),
}


def draw(name: str) -> Figure:
    drawn = DRAW[name]()
    return drawn if isinstance(drawn, Figure) else drawn.figure


def test_one_of_each_is_drawn() -> None:
    assert {name for name in plots.__all__ if callable(getattr(plots, name))} == DRAW.keys()


def test_leaves_pyplot_and_settings_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums(), dict(matplotlib.rcParams)
    for name in DRAW:
        draw(name).draw_without_rendering()
    assert (plt.get_fignums(), dict(matplotlib.rcParams)) == before


def test_imports_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import pyro_vmem.plots, pyro_vmem.app.report"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def written(figure: Figure) -> list[Any]:
    """Everything on a figure that is read as text."""
    found = []
    for ax in figure.axes:
        found += [*ax.texts]
        if legend := ax.get_legend():
            found += legend.get_texts()
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            at = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)  # none where shared
            found += [ax.title, axis.label, *(label for place, label in at if low <= place <= high)]
    return [text for text in dict.fromkeys(found) if text.get_text()]


@pytest.mark.parametrize("name", DRAW)
def test_text_and_background_are_the_callers(name) -> None:
    with matplotlib.rc_context(plots.ON_ANY_PAGE):
        figure = draw(name)
    figure.draw_without_rendering()  # under the settings of later
    assert figure.get_facecolor()[3] == 0
    assert all(ax.get_facecolor()[3] == 0 for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>")
    assert {to_hex(text.get_color()) for text in written(figure)} <= {MID_TONE}
    with matplotlib.rc_context({"figure.facecolor": "yellow"}):
        assert draw(name).get_facecolor() == to_rgba("yellow")


@pytest.mark.parametrize("name", DRAW)
def test_no_text_overlaps_another_or_leaves_the_figure(name) -> None:
    figure = draw(name)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in written(figure) if text.get_visible()]
    assert boxes or name == "images"
    for box in boxes:
        assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def contrast(one: str, other: str) -> float:
    """The contrast ratio of the Web Content Accessibility Guidelines 2.2, 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(colour)[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#15181c"])
def test_colours_stand_out_from_white_and_dark_pages(page) -> None:
    assert contrast("black", "white") == pytest.approx(21)
    assert all(contrast(colour, page) >= 3 for colour in (BLUE, GREEN, ORANGE, PURPLE))  # what WCAG asks of graphics
    assert contrast(MID_TONE, page) >= 4


class TestLearningCurves:
    def test_lines_are_the_rows(self) -> None:
        ax = axes()
        assert plots.learning_curves(ax, HISTORY, ["bound", "val_bound", "kl_a"]) is ax
        bound, val_bound, kl_a = ax.lines
        assert bound.get_xydata().tolist() == [[500, -120], [1000, -110], [1500, -105], [2000, -100]]
        assert val_bound.get_xydata().tolist() == [[1000, -115], [2000, -104]]
        assert kl_a.get_ydata()[-1] == 2.6
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["bound", "bound, validation", "KL(a)"]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "nats per datapoint")

    def test_without_validation_the_bound_is_drawn_alone(self) -> None:
        rows = [{"step": 1, "bound": -3.0}, {"step": 2, "bound": -2.0}]
        (bound,) = plots.learning_curves(axes(), rows).lines
        assert bound.get_xydata().tolist() == [[1, -3], [2, -2]]
        with pytest.raises(ValueError, match="no term 'bound' in the history"):
            plots.learning_curves(axes(), [{"step": 1}])

    def test_validation_differs_by_more_than_colour(self) -> None:
        bound, val_bound = plots.learning_curves(axes(), HISTORY).lines
        assert bound.get_color() == val_bound.get_color()
        assert bound.get_linestyle() != val_bound.get_linestyle()
        assert bound.get_marker() != val_bound.get_marker()

    @pytest.mark.parametrize("column", ["kl_z", "seconds", "val_kl_a"])
    def test_refuses_what_is_not_there_or_not_in_nats(self, column) -> None:
        with pytest.raises(ValueError, match=rf"'{column}'.*Choose from \['bound', 'kl_a', 'val_bound'\]"):
            plots.learning_curves(axes(), HISTORY, [column])


class TestImages:
    def test_ink_is_dark_and_each_image_is_in_its_place(self) -> None:
        x = torch.zeros(3, 1, 4, 4)
        x[2] = 1.0
        ax = axes()
        assert plots.images(ax, x, columns=2) is ax
        canvas = np.asarray(ax.images[0].get_array())
        assert canvas.shape == (11, 11, 4)
        assert (canvas[1:5, 1:5] == 1).all()
        assert (canvas[6:10, 1:5, :3] == 0).all()
        assert (canvas[7:, 7:, 3] == 0).all()  # no fourth image

    def test_colours_stay(self) -> None:
        x = pictures(1, channels=3)
        canvas = np.asarray(plots.images(axes(), x.numpy()).images[0].get_array())
        np.testing.assert_allclose(canvas[1:7, 1:7, :3], x[0].permute(1, 2, 0), rtol=1e-6)

    @pytest.mark.parametrize("shape", [(3, 4, 4), (2, 2, 4, 4), (0, 1, 4, 4)])
    def test_refuses_what_is_no_image(self, shape) -> None:
        with pytest.raises(ValueError, match=r"images: expected images \(N, C, H, W\)"):
            plots.images(axes(), torch.zeros(shape))

    def test_refuses_no_columns(self) -> None:
        with pytest.raises(ValueError, match=r"columns: expected a whole number in \[1, 10,000,000\], got 0"):
            plots.images(axes(), pictures(2), columns=0)


def bars(figure: Figure) -> list[float]:
    """The widths of the bars that are not track."""
    return [bar.get_width() for filled in figure.axes[0].containers[1::2] for bar in filled]


def framed(figure: Figure) -> list[int]:
    """Which pictures have a green frame, counting from the left and the top."""
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]
    return [index for index, line in enumerate(lines) if line.get_color() == GREEN]


def ticks(figure: Figure) -> int:
    return sum(line.get_marker() == "o" for line in figure.axes[0].lines)


def lookup(figure, target, templates, probabilities, correct, max_slots=8, exact=None):
    """One lookup, with the classes 1 for correct templates and 0 for others."""
    rows = None if exact is None else exact[None]
    labels = correct.long(), torch.ones(1, dtype=torch.long)
    return plots.lookups(figure, target[None], templates, probabilities[None], *labels, max_slots, rows)


class TestLookup:
    m = pictures(4)
    q = torch.tensor([0.002, 0.06, 0.008, 0.93])

    def test_most_probable_first(self) -> None:
        figure = Figure((5, 2))
        correct = torch.tensor([False, True, False, False])
        assert lookup(figure, self.m[0], self.m, self.q, correct) is figure
        assert bars(figure) == pytest.approx([0.93, 0.06, 0.008, 0.002])
        assert texts(figure)[3:] == ["93 %", "6 %", "1 %", "<1 %"]
        drawn = [np.asarray(image.get_array())[..., 0] for image in figure.axes[0].images]
        for got, source in zip(drawn, [0, 3, 1, 2, 0], strict=True):
            np.testing.assert_allclose(got, 1 - self.m[source, 0], rtol=1e-6)

    def test_right_class_has_a_frame_and_a_tick(self) -> None:
        figure = lookup(Figure(), self.m[0], self.m, self.q, torch.tensor([True, True, False, False]))
        assert framed(figure) == [2, 4]  # 0 is the target
        assert ticks(figure) == 3  # one is the key's

    def test_right_template_far_down_takes_the_last_place(self) -> None:
        correct = torch.tensor([True, False, False, False])
        figure = lookup(Figure(), self.m[0], self.m, self.q, correct, max_slots=2)
        assert bars(figure) == pytest.approx([0.93, 0.002])
        assert framed(figure) == [2]
        assert sum(line.get_marker() == "." for line in figure.axes[0].lines) == 1  # the ellipsis

    def test_no_right_template(self) -> None:
        figure = lookup(Figure(), self.m[0], self.m, self.q, torch.zeros(4), max_slots=3)
        assert bars(figure) == pytest.approx([0.93, 0.06, 0.008])
        assert framed(figure) == []

    @pytest.mark.parametrize(("p", "text"), [(1.0, "100 %"), (0.9999, ">99 %"), (0.5, "50 %"), (0.0, "0 %")])
    def test_percent(self, p, text) -> None:
        figure = lookup(Figure(), self.m[0], self.m[:2], torch.tensor([p, 0.0]), torch.zeros(2))
        assert texts(figure)[3] == text

    def test_draws_on_a_subfigure(self) -> None:
        left, right = Figure((8, 2)).subfigures(1, 2)
        assert lookup(left, self.m[0], self.m, self.q, torch.zeros(4)) is left
        assert (len(left.axes), len(right.axes)) == (1, 0)

    def test_rows_are_lookups(self) -> None:
        q = torch.stack([self.q, self.q.flip(0)]).requires_grad_()
        figure = plots.lookups(Figure(), self.m[:2], self.m, q, torch.tensor([5, 6, 7, 8]), torch.tensor([8, 8]))
        assert bars(figure) == pytest.approx([0.93, 0.06, 0.008, 0.002, 0.93, 0.06, 0.008, 0.002], rel=1e-5)
        assert framed(figure) == [1, 9]

    def test_refuses_shapes_that_do_not_agree(self) -> None:
        with pytest.raises(ValueError, match=r"probabilities: expected shape \(2, 4\)"):
            plots.lookups(Figure(), self.m[:2], self.m, self.q[None], torch.arange(4), torch.arange(2))
        with pytest.raises(ValueError, match="with 2 and 3 labels"):
            plots.lookups(Figure(), self.m[:2], self.m, self.q.expand(2, 4), torch.arange(3), torch.arange(2))
        with pytest.raises(ValueError, match="max_slots: expected a whole number"):
            lookup(Figure(), self.m[0], self.m, self.q, torch.zeros(4), max_slots=0)


class TestInformationGain:
    gain = torch.tensor([0.1, 2.0, 2.9, 2.9])

    def test_lines_at_the_two_logarithms(self) -> None:
        ax = axes()
        assert plots.information_gain_histogram(ax, self.gain, 100, 20) is ax
        assert [line.get_xdata()[0] for line in ax.lines] == pytest.approx([math.log(100), math.log(20)])
        assert [text.get_text() for text in ax.texts] == ["log |M| = 4.61", "log C = 3.00"]
        assert "nats" in ax.get_xlabel()

    def test_labels_of_close_lines_are_apart(self) -> None:
        ax = plots.information_gain_histogram(Figure((4, 3)).subplots(), self.gain, 25, 20)
        ax.figure.draw_without_rendering()
        slots, classes = (text.get_window_extent() for text in ax.texts)
        assert not slots.overlaps(classes)

    def test_one_line_if_they_are_equal(self) -> None:
        ax = plots.information_gain_histogram(axes(), self.gain, 20, 20)
        assert [text.get_text() for text in ax.texts] == ["log |M| = log C = 3.00"]
        assert len(ax.lines) == 1

    def test_counts_every_datapoint_once(self) -> None:
        exact = torch.full((2, 5), 3.2)  # above log C, as an estimate may be
        ax = plots.information_gain_histogram(axes(), self.gain.reshape(2, 2), 20, 20, exact)
        assert sum(bar.get_height() for bar in ax.containers[0]) == 4
        outline = ax.patches[-1]
        assert not outline.get_fill()
        assert outline.get_xy()[:, 1].max() == 10
        legend = [text.get_text() for text in ax.get_legend().get_texts()]
        assert legend == ["guide q(a | M, x), mean 1.98", "exact p(a | x, M), mean 3.20"]

    def test_no_bar_reaches_over_the_most_that_can_be_told(self) -> None:
        most = torch.full((7,), math.log(100))  # in float32, which rounds up
        ax = plots.information_gain_histogram(axes(), torch.cat([self.gain, most * (1 + 1e-7)]), 100, 20)
        last = ax.containers[0][-1]
        assert last.get_height() == 7
        assert last.get_x() + last.get_width() == pytest.approx(math.log(100))

    def test_one_slot(self) -> None:
        ax = plots.information_gain_histogram(axes(), torch.zeros(3), 1, 1)
        assert ax.lines[0].get_xdata()[0] == 0


class TestOneShotGenerations:
    def test_template_framed_beside_its_samples(self) -> None:
        m, samples = pictures(2, channels=3, height=4), pictures(6, channels=3, height=4).reshape(2, 3, 3, 4, 6)
        figure = Figure()
        assert plots.one_shot_generations(figure, m, samples) is figure
        ax = figure.axes[0]
        drawn = [np.asarray(image.get_array()) for image in ax.images]
        sources = [m[0], *samples[0], m[1], *samples[1]]
        for got, source in zip(drawn, sources, strict=True):
            np.testing.assert_allclose(got, source.permute(1, 2, 0), rtol=1e-6)
        colours = [line.get_color() for line in ax.lines]
        assert [index for index, colour in enumerate(colours) if colour == BLUE] == [0, 4]

    def test_refuses_rows_that_do_not_agree(self) -> None:
        with pytest.raises(ValueError, match="with R = 2, got"):
            plots.one_shot_generations(Figure(), pictures(2), pictures(3)[:, None])


def test_a_graphical_model_has_an_arrow_for_each_dependence_and_argument() -> None:
    ax = plots.graphical_model(axes(), RELATIONS, ["M"])
    arrows = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == 3 + 3
    alphas = [patch.get_facecolor()[3] for patch in ax.patches if type(patch).__name__ == "Circle"]
    assert sorted(alphas) == [0.0, 0.0, 0.25]  # what is observed is grey


def test_a_program_without_sites_is_refused() -> None:
    with pytest.raises(ValueError, match="relations: the program has no site"):
        plots.graphical_model(axes(), RELATIONS | {"sample_sample": {}})
