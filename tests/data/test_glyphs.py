"""glyphs: enough classes, no two of them alike, and drawings that stay inside the frame."""

from __future__ import annotations

import functools
import string
import sys
import unicodedata

import pytest
import torch
import torch.nn.functional as F

from pyro_vmem.data import FewShotDataset, glyphs

pytest.importorskip("matplotlib", reason="the fonts come with matplotlib")


@functools.cache
def default() -> FewShotDataset:
    return glyphs()


def border(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images[..., [0, -1], :].flatten(1), images[..., [0, -1]].flatten(1)], 1)


def test_as_many_classes_as_omniglot_has_in_its_background_set() -> None:
    dataset = default()
    assert dataset.num_classes >= 1300
    assert len(dataset.alphabet_names) >= 9
    assert torch.bincount(dataset.alphabets).min() >= 15
    assert torch.unique(dataset.class_sizes).tolist() == [20]
    assert dataset.image_shape == (1, 28, 28)
    assert dataset.images.dtype == torch.uint8
    assert torch.unique(dataset.images).tolist() == [0, 255]


def test_an_alphabet_split_comes_near_its_share() -> None:
    for seed in range(3):
        train, test = default().split(test=0.2, seed=seed)
        assert 0.1 < test.num_classes / default().num_classes < 0.3
        assert not set(train.class_names) & set(test.class_names)


def test_classes_are_letters_of_their_alphabet() -> None:
    dataset = default()
    for name, alphabet in zip(dataset.class_names, dataset.alphabets.tolist(), strict=True):
        assert unicodedata.category(unicodedata.lookup(name)) in {"Lu", "Ll", "Lt", "Lo"}
        assert dataset.alphabet_names[alphabet].split()[0].upper() in {name.split()[0], "OLD"}


def test_ink_is_whole_centred_and_fills_the_frame() -> None:
    ink = default().images[:, 0] > 0
    assert not border(ink).any()
    assert ink.flatten(1).any(1).all()
    rows, columns = ink.any(2), ink.any(1)
    extent = torch.maximum(rows.sum(1), columns.sum(1))
    assert extent.float().mean() > 18
    # A row of dots has gaps, and a short box turned by ten degrees reaches less far than its corners.
    assert (extent >= 10).float().mean() > 0.99
    place = torch.arange(28).float()
    for profile in (rows, columns):
        first = torch.where(profile, place, 99.0).amin(1)
        last = torch.where(profile, place, -1.0).amax(1)
        assert ((first + last) / 2 - 13.5).abs().max() < 5


def test_drawings_of_a_class_differ_but_resemble_each_other_more_than_others() -> None:
    images = default().images
    assert len(torch.unique(images.flatten(1), dim=0)) > 0.999 * len(images)
    ink = F.avg_pool2d(default().to_float(images), 2).reshape(-1, 20, 14 * 14)
    centred = ink - ink.mean((0, 1))
    unit = centred / centred.norm(dim=-1, keepdim=True)
    within = (unit[:, 0] * unit[:, 12]).sum(-1).mean()
    between = (unit[:, 0] * unit[:, 12].roll(1, 0)).sum(-1).mean()
    assert within > between + 0.2


@pytest.mark.parametrize(
    "alike",
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"),
        ("LATIN CAPITAL LETTER O", "GREEK CAPITAL LETTER OMICRON", "LATIN SMALL LETTER O"),
        ("LATIN SMALL LETTER P", "CYRILLIC SMALL LETTER ER"),
        ("LATIN CAPITAL LETTER K", "KELVIN SIGN"),
    ],
)
def test_look_alikes_are_one_class(alike: tuple[str, ...]) -> None:
    assert len(set(alike) & set(default().class_names)) == 1


def test_letters_with_accents_that_cannot_be_told_apart_are_not_both_there() -> None:
    names = set(default().class_names)
    assert not {"LATIN CAPITAL LETTER E WITH CARON", "LATIN CAPITAL LETTER E WITH TILDE"} <= names
    assert {"LATIN SMALL LETTER S WITH CIRCUMFLEX", "LATIN SMALL LETTER S WITH CARON"} <= names


def test_distinct_letters_stay() -> None:
    names = set(default().class_names)
    for letter in string.ascii_uppercase:
        assert unicodedata.name(letter) in names
    for name in ("GREEK SMALL LETTER LAMDA", "CYRILLIC CAPITAL LETTER ZHE", "HEBREW LETTER ALEF"):
        assert name in names


def test_no_two_classes_look_alike_in_one_font() -> None:
    letters = sys.modules["pyro_vmem.data.glyphs"]._letters()
    font = pytest.importorskip("PIL.ImageFont").truetype(
        pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf/DejaVuSerif.ttf", 48, layout_engine=0
    )
    seen: dict[bytes, str] = {}
    for letter in letters:
        if "DejaVuSerif" in letter.fonts:
            mask = font.getmask(letter.char)
            assert seen.setdefault(bytes(mask) + bytes(mask.size), letter.char) == letter.char


def test_no_marks_ligatures_or_mathematical_variants() -> None:
    for name in default().class_names:
        assert not name.startswith(("MATHEMATICAL", "MODIFIER", "DOUBLE-STRUCK", "LATIN SMALL LIGATURE F"))
    assert "CANADIAN SYLLABICS Y-CREE W" not in default().class_names  # a dot


def test_seed_and_nothing_else_decides() -> None:
    state = torch.random.get_rng_state()
    one = glyphs(drawings=3, seed=4)
    torch.manual_seed(123)
    two = glyphs(drawings=3, seed=4)
    assert torch.equal(one.images, two.images)
    assert one.class_names == two.class_names
    torch.random.set_rng_state(state)
    glyphs(drawings=3, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(one.images, glyphs(drawings=3, seed=5).images)


def test_size_drawings_and_jitter() -> None:
    dataset = glyphs(size=40, drawings=2, jitter=2)
    assert dataset.image_shape == (1, 40, 40)
    assert torch.unique(dataset.class_sizes).tolist() == [2]
    assert dataset.class_names == default().class_names
    assert not border(dataset.images > 0).any()


def test_without_jitter_drawings_are_the_styles_in_turn() -> None:
    letters = sys.modules["pyro_vmem.data.glyphs"]._letters()
    dataset = glyphs(drawings=24, jitter=0)
    assert dataset.num_classes == len(letters)
    compared = 0
    for letter, drawings in zip(letters, dataset.images.reshape(-1, 24, 28 * 28), strict=True):
        styles = len(letter.fonts)
        if styles >= 12:  # of fewer, some are blank at this size
            compared += 1
            assert torch.equal(drawings[: 24 - styles], drawings[styles:])
    assert compared >= 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 11}, r"size, jitter: expected 12 to 1024 and at most 2, got 11 and 1\.0"),
        ({"drawings": 0}, r"drawings: expected a whole number in \[1, 10,000,000\], got 0"),
        ({"jitter": -0.1}, r"jitter: expected a number of at least 0, got \-0\.1"),
        ({"jitter": 2.5}, r"size, jitter: expected 12 to 1024 and at most 2, got 28 and 2\.5"),
    ],
)
def test_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)  # type: ignore[arg-type]


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sys.modules["pyro_vmem.data.glyphs"]._letters.cache_clear()
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install '.\[plots\]'"):
        glyphs()
