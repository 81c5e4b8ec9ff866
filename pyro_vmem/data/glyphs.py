"""The default data set, without a download: letters of many scripts, rendered from the fonts of matplotlib."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pyro_vmem._utils.checks import Count, NonNegative, NonNegativeInt, Size
from pyro_vmem._utils.defaults import usual_defaults
from pyro_vmem._utils.extras import require
from pyro_vmem.data.dataset import FewShotDataset

__all__ = ["glyphs"]

Bitmap = NDArray[np.uint8]

# The character maps of the first fonts are right for every letter, those of the TeX fonts for ASCII only: they have a
# Psi as the feminine ordinal. The display, symbol and last-resort fonts have no letters.
_REGULAR_FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
_UNICODE_FONTS = (
    *_REGULAR_FONTS,
    *("DejaVuSans-Oblique", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique", "STIXGeneralItalic"),
    *("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol"),
    *("DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique", "STIXGeneralBolIta"),
)
_ASCII_FONTS = ("cmr10", "cmss10", "cmtt10", "cmti10", "cmb10", "cmmi10")

# Two letters look alike if, in some regular font and at the same size, at most this share of the ink of either is
# further than one pixel in 36 from the ink of the other. At 0.06, Latin A, Greek Alpha and Cyrillic A are one class,
# and so are an E with a caron and an E with a tilde. An s with a circumflex and one with a caron are two classes.
_ALIKE = 0.06
_ALIKE_INK = 36
_ALIKE_RESOLUTION = 48

# A letter smaller than this share of the font size in both directions is a mark, such as a dot. It would fill a frame.
_MARK = 0.3

# Scripts with fewer letters are left out, because a held-out alphabet needs some classes.
_MIN_LETTERS = 15
_MIN_STYLES = 4  # of a letter
_SCRIPT_NAMES = {"CANADIAN": "Canadian Syllabics", "OLD": "Old Italic"}

# The jitter at strength 1: each is the bound of a uniform draw.
_ROTATION = math.radians(10)
_LOG_ASPECT = 0.15
_SHEAR = 0.15
_SHRINK = 0.2
_SHIFT = 2 / 28  # of the frame

_CHUNK = 2048


@dataclass(frozen=True)
class _Letter:
    """A class: one letter and the fonts that draw it differently."""

    char: str
    script: str
    fonts: tuple[str, ...]


@usual_defaults(torch.float32)
def glyphs(
    size: Size = 28, drawings: Count = 20, seed: NonNegativeInt = 0, jitter: NonNegative = 1.0
) -> FewShotDataset:
    r"""Letters of many scripts as binary images: a data set the size of Omniglot, without a download.

    A class is a letter, named as in Unicode, and an alphabet is a script. The styles of a class are the fonts that
    matplotlib ships and that have the letter (DejaVu Sans, Serif and Mono, STIX and Computer Modern, upright, slanted
    and bold). Letters that look alike, within or across scripts, are one class. A drawing is a style under a random
    rotation, anisotropic scale, shear and shift, with all of its ink inside the frame.

    The images depend on the arguments, and on the versions of matplotlib and pillow.

    Arguments:
        size: The height and width of the images; at least 12.
        drawings: The number of drawings of each class; its styles are used in turn.
        seed: The seed of the jitter.
        jitter: The strength of the jitter. At 1 the rotation is up to 10 degrees, the aspect ratio changes by up to 16
            %, the shear is up to 0.15 and the size shrinks by up to 20 %. At 0 drawings of the same style are equal.

    Returns:
        A data set of `uint8` images with shape :math:`(N, 1, H, W)` and values 0 (paper) and 255 (ink).

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `size` or `jitter` is out of range.

    Example:
        >>> dataset = glyphs(drawings=4)
        >>> dataset.image_shape
        (1, 28, 28)
        >>> dataset.class_names[0], dataset.alphabet_names[0]
        ('ARABIC LETTER HAMZA', 'Arabic')
    """
    if not 12 <= size <= 1024 or jitter > 2:
        raise ValueError(f"size, jitter: expected 12 to 1024 and at most 2, got {size} and {jitter}.")
    letters = _letters()
    # Bitmaps of about the final size, smoothed by FreeType: sampling a finer bitmap would miss thin strokes.
    sources = _render_styles(letters, drawings, resolution=math.ceil(1.5 * size))
    generator = torch.Generator().manual_seed(seed)
    images = torch.cat(
        [_warp(sources[start : start + _CHUNK], size, jitter, generator) for start in range(0, len(sources), _CHUNK)]
    )
    scripts = sorted({letter.script for letter in letters})
    return FewShotDataset(
        images=images[:, None],
        classes=torch.arange(len(letters)).repeat_interleave(drawings),
        class_names=[unicodedata.name(letter.char) for letter in letters],
        alphabets=torch.tensor([scripts.index(letter.script) for letter in letters]),
        alphabet_names=scripts,
    )


class _Font:
    """One font file: its letters, and their bitmaps at any resolution."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._path = str(Path(require("matplotlib", "plots").get_data_path(), "fonts", "ttf", f"{name}.ttf"))
        self._image_font = require("PIL.ImageFont", "plots")
        self._sizes: dict[int, Any] = {}

    def letters(self) -> list[str]:
        """The letters that have a shape of their own in this font."""
        codes = require("matplotlib.ft2font", "plots").FT2Font(self._path).get_charmap()
        chars = [chr(code) for code in sorted(codes) if _is_letter(chr(code))]
        return [char for char in chars if char.isascii()] if self.name in _ASCII_FONTS else chars

    def extent(self, char: str) -> float:
        """The longer side of the ink of a letter as a share of the font size; 0 if it is blank."""
        bitmap = self._bitmap(char, 48)
        return 0.0 if bitmap is None else max(bitmap.shape) / 48

    def render(self, char: str, resolution: int) -> Bitmap | None:
        """Draws a letter, cropped to its ink: its longer side has 0.6 to 1 times `resolution` pixels."""
        size = round(0.86 * resolution)
        bitmap = self._bitmap(char, size)
        if bitmap is not None and not 0.6 * resolution <= max(bitmap.shape) <= resolution:
            bitmap = self._bitmap(char, max(4, math.floor(0.95 * size * resolution / max(bitmap.shape))))
        return bitmap

    def _bitmap(self, char: str, size: int) -> Bitmap | None:
        if size not in self._sizes:
            # The basic layout draws the character itself; Raqm would shape Arabic letters by context.
            self._sizes[size] = self._image_font.truetype(self._path, size, layout_engine=self._image_font.Layout.BASIC)
        mask = self._sizes[size].getmask(char, mode="L")
        width, height = mask.size
        bitmap = np.frombuffer(bytes(mask), dtype=np.uint8).reshape(height, width)
        rows, columns = (np.flatnonzero(bitmap.any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:  # a blank filler
            return None
        return bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _is_letter(char: str) -> bool:
    """Whether a character is a letter in its own right."""
    if unicodedata.category(char) not in ("Lu", "Ll", "Lt", "Lo"):  # modifier letters are marks
        return False
    # Ligatures, superscripts and mathematical alphabets repeat other letters; Unicode gives them a tagged
    # decomposition. Positional forms of Arabic letters have one too, but also shapes of their own.
    tag, *parts = unicodedata.decomposition(char).split() or [""]
    return not tag.startswith("<") or (tag in ("<initial>", "<medial>", "<final>") and len(parts) == 1)


@functools.cache
def _letters() -> tuple[_Letter, ...]:
    """Chooses the classes; cached, because it takes a second or two."""
    fonts = {name: _Font(name) for name in _UNICODE_FONTS + _ASCII_FONTS}
    fonts_of: dict[str, list[str]] = {}
    for name, font in fonts.items():
        for char in font.letters():
            fonts_of.setdefault(char, []).append(name)
    chars = [
        char
        for char in sorted(fonts_of)
        if len(fonts_of[char]) >= _MIN_STYLES and fonts[fonts_of[char][0]].extent(char) >= _MARK
    ]

    letters: list[_Letter] = []
    for char in _distinct_letters(chars, [len(fonts_of[char]) for char in chars], fonts):
        bitmaps: dict[tuple[tuple[int, ...], bytes], str] = {}  # the first font of each bitmap
        for name in fonts_of[char]:
            bitmap = fonts[name].render(char, _ALIKE_RESOLUTION)
            if bitmap is not None:
                bitmaps.setdefault((bitmap.shape, bitmap.tobytes()), name)
        if len(bitmaps) >= _MIN_STYLES:
            script = unicodedata.name(char).split()[0]
            letters.append(_Letter(char, _SCRIPT_NAMES.get(script, script.capitalize()), tuple(bitmaps.values())))

    sizes = Counter(letter.script for letter in letters)
    letters = [letter for letter in letters if sizes[letter.script] >= _MIN_LETTERS]
    return tuple(sorted(letters, key=lambda letter: (letter.script, letter.char)))


def _distinct_letters(chars: Sequence[str], ranks: Sequence[int], fonts: dict[str, _Font]) -> list[str]:
    """Keeps letters no two of which look alike, those of more fonts first.

    Every letter left out looks like a kept one. Merging along chains of similar letters would join letters that do not
    look alike.
    """
    alike = torch.zeros(len(chars), len(chars), dtype=torch.bool)
    for name in _REGULAR_FONTS:
        in_font = set(fonts[name].letters())
        found = [(i, fonts[name].render(char, _ALIKE_RESOLUTION)) for i, char in enumerate(chars) if char in in_font]
        bitmaps = {i: bitmap for i, bitmap in found if bitmap is not None}
        if bitmaps:
            index = torch.tensor(list(bitmaps))
            alike[index[:, None], index] |= _stray_ink(list(bitmaps.values())) <= _ALIKE

    kept = []
    free = torch.ones(len(chars), dtype=torch.bool)
    for i in sorted(range(len(chars)), key=lambda i: (-ranks[i], chars[i])):
        if free[i]:
            kept.append(chars[i])
            free &= ~alike[i]
    return kept


def _stray_ink(bitmaps: Sequence[Bitmap]) -> Tensor:
    """For each pair, the larger share of the ink of one letter that is far from the ink of the other, (n, n)."""
    frame = _ALIKE_INK + 4  # the ink grows by one pixel on each side
    scale = torch.tensor([_ALIKE_INK / max(bitmap.shape) for bitmap in bitmaps])
    linear = torch.diag_embed(scale[:, None].expand(-1, 2))
    ink = (_resample(bitmaps, linear, torch.zeros(len(bitmaps), 2), frame) > 0.4).float()
    near = F.max_pool2d(ink[:, None], 3, stride=1, padding=1)[:, 0].flatten(1)
    ink = ink.flatten(1)
    stray = 1 - (ink @ near.T) / ink.sum(1, keepdim=True)
    return torch.maximum(stray, stray.T)


def _render_styles(letters: Iterable[_Letter], drawings: int, resolution: int) -> list[Bitmap]:
    """Renders the bitmap of each drawing of each letter, with its styles in turn."""
    fonts = {name: _Font(name) for name in _UNICODE_FONTS + _ASCII_FONTS}
    sources = []
    for letter in letters:
        styles = [fonts[name].render(letter.char, resolution) for name in letter.fonts[:drawings]]
        found = [style for style in styles if style is not None]
        sources += [found[i % len(found)] for i in range(drawings)]
    return sources


def _warp(bitmaps: Sequence[Bitmap], size: int, jitter: float, generator: torch.Generator) -> Tensor:
    """Draws bitmaps in frames under random affine maps that keep all ink inside, shape (n, size, size)."""
    n = len(bitmaps)
    draw = torch.rand(n, 6, generator=generator)
    angle, aspect, shear = ((2 * draw[:, :3] - 1) * torch.tensor([_ROTATION, _LOG_ASPECT, _SHEAR]) * jitter).unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    wide, high = torch.stack([(aspect / 2).exp(), shear], -1), torch.stack([torch.zeros(n), (-aspect / 2).exp()], -1)
    stretch = torch.stack([wide, high], -2)
    linear = rotation @ stretch

    # Scaled by the corners of the ink, which reach furthest, so that nothing is cut off.
    half_box = torch.tensor([[bitmap.shape[1] / 2, bitmap.shape[0] / 2] for bitmap in bitmaps])
    reach = (linear.abs() @ half_box[:, :, None])[:, :, 0]
    half_frame = size / 2 - 1.75 * max(1.0, size / 28)
    scale = half_frame * (1 - _SHRINK * jitter * draw[:, 3]) / reach.amax(1)
    room = (half_frame - reach * scale[:, None]).clamp(0, _SHIFT * size * jitter)
    shift = (2 * draw[:, 4:] - 1) * room
    ink = _resample(bitmaps, linear * scale[:, None, None], shift, size)
    # Below one half, so that the hairlines of serif fonts stay connected.
    return (ink > 0.35).to(torch.uint8) * 255


def _resample(bitmaps: Sequence[Bitmap], linear: Tensor, shift: Tensor, size: int) -> Tensor:
    """Maps bitmaps about their centres by `linear` (n, 2, 2) and `shift` (n, 2), pixels, into frames."""
    side = max(max(bitmap.shape) for bitmap in bitmaps) + 2
    canvas = np.zeros((len(bitmaps), side, side), dtype=np.uint8)
    for page, bitmap in zip(canvas, bitmaps, strict=True):
        height, width = bitmap.shape
        top, left = (side - height) // 2, (side - width) // 2
        page[top : top + height, left : left + width] = bitmap
    source = torch.from_numpy(canvas).float().div_(255)[:, None]
    # The same as affine_grid, several times faster by broadcasting: the place of each pixel of the frame in the source,
    # in coordinates from -1 to 1.
    inverse = torch.linalg.inv(linear)
    along_x, along_y = (inverse * (size / side)).unbind(-1)
    offset = -(inverse @ shift[:, :, None])[:, :, 0] * (2 / side)
    centres = (2 * torch.arange(size) + 1) / size - 1
    grid = along_x[:, None, None] * centres[:, None] + (
        along_y[:, None, None] * centres[:, None, None] + offset[:, None, None]
    )
    return F.grid_sample(source, grid, align_corners=False)[:, 0]
