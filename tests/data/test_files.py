"""The readers: equality with published arrays, the cache, and an error for each way a source can be wrong."""

from __future__ import annotations

import io
import os
import sys
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyro_vmem.data import FewShotDataset, from_folder, from_npz, mnist, omniglot

Image = pytest.importorskip("PIL.Image", reason="reading images needs pillow")


def needs(*names: str) -> Path:
    """The folder of real data, or a skip that says what is missing."""
    root = os.environ.get("PYRO_VMEM_DATA")
    if not root:
        pytest.skip("PYRO_VMEM_DATA is not set, and this test reads real data")
    for name in names:
        if not Path(root, name).exists():
            pytest.skip(f"PYRO_VMEM_DATA has no {name}")
    return Path(root)


@pytest.fixture(autouse=True)
def no_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Keep the user's own cache and data out of every test."""
    monkeypatch.setenv("PYRO_VMEM_CACHE", str(tmp_path / "cache"))
    if "real" not in request.node.name:
        monkeypatch.delenv("PYRO_VMEM_DATA", raising=False)


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real-cache")


# --- Omniglot ---------------------------------------------------------------------------------


def drawing(seed: int) -> np.ndarray:
    """A random 105x105 drawing, True for ink."""
    return np.random.default_rng(seed).random((105, 105)) < 0.3


def png(ink: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.where(ink, 0, 255).astype(np.uint8)).convert("1").save(file, "PNG")
    return file.getvalue()


MEMBERS = {
    f"{alphabet}/character{c:02}/{c:04}_{d:02}.png": 100 * i + 10 * c + d
    for i, alphabet in enumerate(("Beta", "Alpha"))
    for c in (1, 2)
    for d in (1, 2, 3)
}


def write_folder(root: Path, part: str = "images_background") -> Path:
    for name, seed in MEMBERS.items():
        file = root / part / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(drawing(seed)))
    return root


def write_zip(
    root: Path, part: str = "images_background", more: dict[str, bytes] | None = None, suffix: str = ".zip"
) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"{part}{suffix}", "w") as archive:
        for name, seed in reversed(MEMBERS.items()):
            archive.writestr(f"{part}/{name}", png(drawing(seed)))
        for name, content in (more or {}).items():
            archive.writestr(name, content)
    return root


def same(a: FewShotDataset, b: FewShotDataset) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.classes, b.classes)
        and torch.equal(a.alphabets, b.alphabets)
        and (a.class_names, a.alphabet_names) == (b.class_names, b.alphabet_names)
    )


@pytest.mark.parametrize(
    ("subset", "file", "classes", "alphabets"),
    [("background", "train_small.npz", 964, 30), ("evaluation", "test_small.npz", 659, 20)],
)
@pytest.mark.long
def test_real_omniglot_equals_the_published_arrays(
    subset: str, file: str, classes: int, alphabets: int, real_cache: Path
) -> None:
    root = needs(f"omniglot/{file}", f"omniglot/images_{subset}.zip")
    dataset = omniglot(subset=subset, cache_dir=real_cache)  # type: ignore[arg-type]
    assert (dataset.num_classes, len(dataset.alphabet_names)) == (classes, alphabets)
    assert torch.unique(dataset.class_sizes).tolist() == [20]
    with np.load(root / "omniglot" / file) as published:
        assert {f"images_{subset}/{name}" for name in dataset.class_names} == set(published.files)
        for index, name in enumerate(dataset.class_names):
            ours = sorted(image.tobytes() for image in dataset.images[dataset.classes == index].numpy())
            theirs = sorted((255 - image).tobytes() for image in published[f"images_{subset}/{name}"])
            assert ours == theirs, name


@pytest.mark.long
def test_real_omniglot_nearest26_is_pillows_resize(real_cache: Path) -> None:
    root = needs("omniglot/images_evaluation.zip")
    dataset = omniglot(subset="evaluation", resize="nearest26", cache_dir=real_cache)
    assert dataset.image_shape == (1, 26, 26)
    with zipfile.ZipFile(root / "omniglot" / "images_evaluation.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        for index in range(0, len(names), 997):
            paper = Image.open(archive.open(names[index])).resize((26, 26), Image.Resampling.NEAREST)
            assert np.array_equal(dataset.images[index, 0].numpy() == 255, ~np.asarray(paper))
            class_name = dataset.class_names[int(dataset.classes[index])]
            assert names[index].startswith(f"images_evaluation/{class_name}/")


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("inside", [".", "omniglot", "omniglot-py"])
def test_omniglot_order_names_and_ink(write: Callable[[Path], Path], inside: str, tmp_path: Path) -> None:
    write(tmp_path / "root" / inside)
    dataset = omniglot(tmp_path / "root", subset="background", resize=None)
    assert dataset.class_names == [
        "Alpha/character01",
        "Alpha/character02",
        "Beta/character01",
        "Beta/character02",
    ]
    assert dataset.alphabet_names == ["Alpha", "Beta"]
    assert dataset.alphabets.tolist() == [0, 0, 1, 1]
    assert dataset.classes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for image, name in zip(dataset.images, sorted(MEMBERS), strict=True):
        assert np.array_equal(image[0].numpy(), drawing(MEMBERS[name]) * np.uint8(255))


def test_omniglot_all_is_both_parts(tmp_path: Path) -> None:
    write_folder(tmp_path)
    file = tmp_path / "images_evaluation" / "Gamma" / "character01" / "0009_01.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(png(drawing(9)))
    dataset = omniglot(tmp_path)
    assert (len(dataset), dataset.class_names[-1], dataset.alphabet_names[-1]) == (
        13,
        "Gamma/character01",
        "Gamma",
    )


def test_omniglot_resize_modes(tmp_path: Path) -> None:
    write_zip(tmp_path)
    ink = drawing(MEMBERS["Alpha/character01/0001_01.png"])
    index = [105 * i // 28 for i in range(28)]
    pooled = [[ink[4 * r : 4 * r + 4, 4 * c : 4 * c + 4].any() for c in range(26)] for r in range(26)]
    paper = Image.fromarray(np.where(ink, 0, 255).astype(np.uint8))
    expected = {
        "index28": ink[index][:, index],
        "nearest26": np.asarray(paper.resize((26, 26), Image.Resampling.NEAREST)) == 0,
        "maxpool26": np.array(pooled),
        None: ink,
    }
    for mode, image in expected.items():
        dataset = omniglot(tmp_path, subset="background", resize=mode)  # type: ignore[arg-type]
        assert np.array_equal(dataset.images[0, 0].numpy() == 255, image), mode


def test_omniglot_cache_is_written_once_and_read_back_equal(tmp_path: Path) -> None:
    write_folder(tmp_path / "root")
    first = omniglot(tmp_path / "root", subset="background")
    (file,) = (tmp_path / "cache").iterdir()
    written = file.stat().st_mtime_ns, file.read_bytes()
    # Same names, sizes and times: what is read now can only come from the cache.
    for path in (tmp_path / "root").rglob("*.png"):
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(omniglot(tmp_path / "root", subset="background"), first)
    assert (file.stat().st_mtime_ns, file.read_bytes()) == written
    assert list((tmp_path / "cache").iterdir()) == [file]
    with pytest.raises(ValueError, match="cannot read"):
        omniglot(tmp_path / "root", subset="background", cache_dir=tmp_path / "other")


@pytest.mark.parametrize("damage", [b"", b"not a zip", None, "swap"])
def test_omniglot_damaged_cache_is_rebuilt(damage: bytes | str | None, tmp_path: Path) -> None:
    write_zip(tmp_path)
    first = omniglot(tmp_path, subset="background")
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    if damage == "swap":
        np.savez(file, bits=np.zeros((2, 98), np.uint8), shape=[2, 28, 28], names=["a/b"])
    else:
        assert not isinstance(damage, str)
        file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(omniglot(tmp_path, subset="background"), first)
    assert file.read_bytes() == whole


def test_omniglot_changed_source_is_read_again(tmp_path: Path) -> None:
    write_folder(tmp_path)
    first = omniglot(tmp_path, subset="background")
    file = tmp_path / "images_background" / "Alpha" / "character01" / "0001_01.png"
    file.write_bytes(png(~drawing(1)))
    assert not same(omniglot(tmp_path, subset="background"), first)


def test_omniglot_works_where_no_cache_can_be_written(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert len(omniglot(tmp_path, subset="background", cache_dir=tmp_path / "file" / "cache")) == 12


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYRO_VMEM_CACHE": "{}/own"}, "own"),
        ({"PYRO_VMEM_CACHE": "", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/pyro_vmem"),
        ({"PYRO_VMEM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "{}/home"}, "home/.cache/pyro_vmem"),
    ],
)
def test_omniglot_default_cache_folder(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    omniglot(write_folder(tmp_path / "root"), subset="background")
    assert len(list((tmp_path / expected).glob("omniglot-*.npz"))) == 1


def test_omniglot_zip_members_out_of_layout_never_reach_the_disk(tmp_path: Path) -> None:
    strange = {
        "../escape.png": png(drawing(1)),
        "/absolute.png": png(drawing(1)),
        "images_background/../character01/0001_01.png": png(drawing(1)),
        "images_background/Alpha/character01/../../../../0001_02.png": png(drawing(1)),
        "images_background/Alpha/character01/readme.txt": b"text",
        "__MACOSX/images_background/Alpha/character01/._0001_01.png": b"fork",
    }
    write_zip(tmp_path / "root", more=strange)
    dataset = omniglot(tmp_path / "root", subset="background", resize=None)
    assert len(dataset) == len(MEMBERS)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {file for file in files if not file.startswith("cache/")} == {"root/images_background.zip"}


BAD = "images_background/Alpha/character01/0001_09.png"


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (9000, 9000), 1).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", r"cannot read .*0001_09\.png"),
        (png(drawing(0))[:150], r"cannot read .*0001_09\.png"),
        (b"\0" * (1 << 21), r"cannot read .*0001_09\.png \(2097152 bytes\)"),
        (bomb(), r"cannot read .*0001_09\.png \(9000x9000 pixels, more than 1,102,500\)"),
        (png(drawing(0)[:50]), r"0001_09\.png is 105x50, expected 105x105.*from_folder"),
    ],
)
def test_omniglot_bad_image_is_named_and_nothing_is_cached(
    content: bytes, message: str, packed: bool, tmp_path: Path
) -> None:
    if packed:
        write_zip(tmp_path, more={BAD: content})
    else:
        (write_folder(tmp_path) / BAD).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        omniglot(tmp_path, subset="background")
    assert not (tmp_path / "cache").exists()


def test_omniglot_wrong_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="root: got None and the environment variable PYRO_VMEM_DATA is not set"):
        omniglot()
    with pytest.raises(FileNotFoundError, match=r"root: got .*nowhere, expected .*images_background.*download=True"):
        omniglot(tmp_path / "nowhere")
    write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="images_evaluation"):
        omniglot(tmp_path)
    monkeypatch.setenv("PYRO_VMEM_DATA", str(tmp_path))
    assert len(omniglot(subset="background")) == 12
    (tmp_path / "empty" / "images_background").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no drawing"):
        omniglot(tmp_path / "empty", subset="background")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "images_background.zip").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match=r"images_background\.zip is not a readable zip archive"):
        omniglot(tmp_path / "broken", subset="background")


def test_omniglot_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subset: expected 'all' or 'background' or 'evaluation', got 'train'"):
        omniglot(tmp_path, subset="train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"resize: expected 'index28' or .*, got 'index26'"):
        omniglot(tmp_path, resize="index26")  # type: ignore[arg-type]


def stub_torchvision(monkeypatch: pytest.MonkeyPatch, **datasets: object) -> None:
    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    for name, value in datasets.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


def test_omniglot_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(root: str, background: bool, download: bool) -> None:
        calls.append((root, background, download))
        part = "images_background" if background else "images_evaluation"
        write_zip(Path(root, "omniglot-py"), part, suffix=".download")
        with zipfile.ZipFile(Path(root, "omniglot-py", f"{part}.download")) as archive:
            archive.extractall(Path(root, "omniglot-py"))

    stub_torchvision(monkeypatch, Omniglot=fetch)
    root = str(tmp_path / "root")
    dataset = omniglot(root, download=True)
    assert calls == [(root, True, True), (root, False, True)]
    assert len(dataset) == 24
    assert same(omniglot(root, download=True), dataset)
    assert len(calls) == 2, "what is there is not fetched again"


def test_download_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    for source in (omniglot, mnist):
        with pytest.raises(ImportError, match=r"needs torchvision: pip install '.\[vision\]'"):
            source(tmp_path, download=True)


# --- MNIST ------------------------------------------------------------------------------------


def test_real_mnist() -> None:
    root = needs("mnist/binmnist_test.npz")
    dataset = mnist(train=False)
    assert (len(dataset), dataset.image_shape) == (10_000, (1, 28, 28))
    assert dataset.class_names == list("0123456789")
    assert dataset.alphabet_names == ["digits"]
    with np.load(root / "mnist" / "binmnist_test.npz") as published:
        for digit in range(10):
            assert np.array_equal(dataset.images[dataset.classes == digit][:, 0].numpy(), 255 * published[str(digit)])
    assert same(mnist(root / "mnist", train=False), dataset)


def test_mnist_train_and_test_are_different_files(tmp_path: Path) -> None:
    for name, count in (("train", 3), ("test", 2)):
        digits: dict[str, Any] = {str(d): np.ones((count, 28, 28)) for d in range(10)}
        np.savez(tmp_path / f"binmnist_{name}.npz", **digits)
    assert len(mnist(tmp_path)) == 30
    assert len(mnist(tmp_path, train=False)) == 20


def test_mnist_from_torchvision_is_binarised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stub(root: str, train: bool, download: bool) -> types.SimpleNamespace:
        calls.append((root, train, download))
        data = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).repeat(10 * 196).reshape(10, 28, 28)
        return types.SimpleNamespace(data=data, targets=torch.arange(10).flip(0))

    stub_torchvision(monkeypatch, MNIST=stub)
    with pytest.raises(FileNotFoundError, match=r"root: got .*binmnist_train\.npz.*download=True"):
        mnist(tmp_path)
    dataset = mnist(tmp_path, download=True)
    assert dataset.images[0, 0, 0, :4].tolist() == [0, 0, 255, 255]
    assert dataset.classes.tolist() == list(range(9, -1, -1))
    (tmp_path / "MNIST").mkdir()
    mnist(tmp_path, train=False)
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, False)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({str(d): np.ones((1, 28, 28)) for d in range(9)}, "expected one for each digit"),
        ({str(d): np.ones((1, 28, 27)) for d in range(10)}, r"array '0' of shape \(1, 28, 27\)"),
        ({str(d): np.full((1, 28, 28), 0.5) for d in range(10)}, "with values 0 and 1"),
    ],
)
def test_mnist_refuses_other_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "binmnist_train.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        mnist(tmp_path)


# --- Folders ----------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray | list[list[int]], mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, dtype=np.uint8)).convert(mode).save(path)


GREY = [[0, 100, 200], [127, 128, 255]]


def test_from_folder_of_classes(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.png", GREY)
    save(tmp_path / "a" / "2.BMP", GREY)
    save(tmp_path / "a" / "10.png", GREY, "RGB")
    (tmp_path / "a" / "notes.txt").write_text("passed over")
    (tmp_path / "readme.md").write_text("passed over")
    (tmp_path / ".git").mkdir()
    (tmp_path / "a" / "._10.png").write_bytes(b"passed over")
    dataset = from_folder(tmp_path)
    assert dataset.class_names == ["a", "b"]
    assert dataset.classes.tolist() == [0, 0, 1]
    assert len(dataset.alphabet_names) == 1
    assert dataset.images[:, 0].tolist() == [[[255, 255, 0], [255, 0, 0]]] * 3


def test_from_folder_of_alphabets(tmp_path: Path) -> None:
    for name in ("Greek/alpha", "Greek/beta", "Lao/alpha"):
        save(tmp_path / name / "1.png", GREY)
    dataset = from_folder(tmp_path)
    assert dataset.class_names == ["Greek/alpha", "Greek/beta", "Lao/alpha"]
    assert (dataset.alphabet_names, dataset.alphabets.tolist()) == (["Greek", "Lao"], [0, 0, 1])


def test_from_folder_ink_and_threshold(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", GREY)
    assert from_folder(tmp_path, ink="light").images[0, 0].tolist() == [[0, 0, 255], [0, 255, 255]]
    assert from_folder(tmp_path, threshold=0.1).images[0, 0].tolist() == [[255, 255, 255], [255, 255, 0]]
    assert from_folder(tmp_path, threshold=None).images[0, 0].tolist() == [[255, 155, 55], [128, 127, 0]]
    assert from_folder(tmp_path, ink="light", threshold=None).images[0, 0].tolist() == GREY


def test_from_folder_transparent_is_paper_and_16_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    black = np.zeros((1, 2, 4), np.uint8)
    black[0, 1, 3] = 255
    Image.fromarray(black, "RGBA").save(tmp_path / "a" / "1.png")
    Image.fromarray(np.array([[65535, 257 * 100]], np.uint16)).save(tmp_path / "a" / "2.png")
    assert from_folder(tmp_path, threshold=None).images[:, 0].tolist() == [[[0, 255]], [[0, 155]]]


def test_from_folder_size(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", np.zeros((8, 6)))
    save(tmp_path / "a" / "2.png", np.full((4, 3), 255))
    dataset = from_folder(tmp_path, size=(4, 3))
    assert dataset.image_shape == (1, 4, 3)
    assert dataset.images.flatten(1).float().mean(1).tolist() == [255.0, 0.0]
    with pytest.raises(ValueError, match=r"2\.png is 4x3 and .*1\.png is 8x6 .*size=\(H, W\)"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ([], {}, "holds no image, expected path/<class>"),
        (["1.png"], {}, "holds images itself"),
        (["a/1.png", "b/"], {}, r"class folder .*b holds no image"),
        (["a/x/1.png", "b/1.png"], {}, "b is not a folder of class folders"),
        (["a/x/1.png", "a/1.png"], {}, "a is not a folder of class folders"),
        (["a/1.png"], {"ink": "black"}, r"ink: expected 'dark' or 'light', got 'black'"),
        (["a/1.png"], {"threshold": 1.0}, r"threshold: expected a number in \[0, 1\) or None, got 1\.0"),
        (["a/1.png"], {"size": (0, 3)}, r"size: expected tuple\[a whole number in \[1, 1,048,576\], .*, got \(0, 3\)"),
    ],
)
def test_from_folder_refuses(files: list[str], arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    for file in files:
        if file.endswith("/"):
            (tmp_path / file).mkdir()
        else:
            save(tmp_path / file, GREY)
    with pytest.raises(ValueError, match=message):
        from_folder(tmp_path, **arguments)  # type: ignore[arg-type]


def test_from_folder_missing_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: got .*nowhere"):
        from_folder(tmp_path / "nowhere")
    save(tmp_path / "a" / "1.png", GREY)
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*2\.png"):
        from_folder(tmp_path)


@pytest.mark.parametrize("what", ["file", "class", "inside"])
def test_from_folder_follows_no_link_out_of_the_folder(what: str, tmp_path: Path) -> None:
    save(tmp_path / "root" / "a" / "1.png", GREY)
    save(tmp_path / "secret" / "2.png", GREY)
    root = tmp_path / "root"
    if what == "file":
        (root / "a" / "2.png").symlink_to(tmp_path / "secret" / "2.png")
    elif what == "class":
        (root / "b").symlink_to(tmp_path / "secret", target_is_directory=True)
    else:
        (root / "a" / "2.png").symlink_to(root / "a" / "1.png")
        assert len(from_folder(root)) == 2
        return
    with pytest.raises(ValueError, match="is a link out of"):
        from_folder(root)


# --- npz --------------------------------------------------------------------------------------


def test_from_npz_names_and_channel(tmp_path: Path) -> None:
    images = np.arange(4 * 6).reshape(4, 2, 3).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, classes=["x", "z", "y", "x"], alphabets=["B", "A", "B"])
    dataset = from_npz(tmp_path / "a.npz")
    assert dataset.image_shape == (1, 2, 3)
    assert torch.equal(dataset.images[:, 0], torch.from_numpy(images))
    assert (dataset.class_names, dataset.classes.tolist()) == (["x", "y", "z"], [0, 2, 1, 0])
    assert (dataset.alphabet_names, dataset.alphabets.tolist()) == (["A", "B"], [1, 0, 1])


def test_from_npz_vectors_and_booleans(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones((2, 5)), classes=np.array([1, 0], np.int32))
    assert from_npz(tmp_path / "a.npz").image_shape == (5,)
    np.savez(tmp_path / "b.npz", images=np.ones((2, 1, 3, 3), bool), classes=[0, 1])
    assert torch.unique(from_npz(tmp_path / "b.npz").images).tolist() == [255]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.ones((2, 5))}, r"holds the arrays \['images'\], expected 'images' and 'classes'"),
        ({"images": np.ones((2, 5)), "classes": [0, 1], "label": [1]}, "holds the arrays .*'label'"),
        ({"images": np.ones((2, 5)), "classes": [[0, 1]]}, r"classes: got shape \(1, 2\)"),
        (
            {"images": np.ones((2, 5)), "classes": ["a", "b"], "class_names": ["a", "b"]},
            "class_names: expected none",
        ),
        (
            {"images": np.ones((2, 5)), "classes": [0.0, 1.0]},
            r"classes: expected a tensor of dtype Integer and shape \(N\), got .*torch\.float64.*Use classes\.long\(\)",
        ),
        ({"images": np.ones((2, 5), np.int64), "classes": [0, 1]}, "images: got torch.int64"),
        ({"images": np.array(["a", "b"]), "classes": [0, 1]}, "a.npz does not hold a data set"),
        ({"images": np.array([None, {}]), "classes": [0, 1]}, "cannot read .*no objects"),
    ],
)
def test_from_npz_refuses(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        from_npz(tmp_path / "a.npz")


def test_from_npz_missing_or_not_an_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: got .*nowhere"):
        from_npz(tmp_path / "nowhere.npz")
    (tmp_path / "a.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot read"):
        from_npz(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.ones(3))
    with pytest.raises(ValueError, match="cannot read"):
        from_npz(tmp_path / "b.npy")


# --- Files from strangers ---------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 105 105\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of Ghostscript's name that leaves a file when it is started; returns the place of that file."""
    from PIL import EpsImagePlugin

    ran = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return ran


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_the_stand_in_for_ghostscript_is_started_by_a_plain_open(ghostscript: Path, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(POSTSCRIPT)
    with Image.open(tmp_path / "1.png") as image, pytest.raises(Exception):  # noqa: B017, PT011  # it draws nothing
        image.load()
    assert ghostscript.exists()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
@pytest.mark.parametrize("where", ["folder", "omniglot folder", "omniglot zip"])
def test_no_picture_starts_a_program(where: str, ghostscript: Path, tmp_path: Path) -> None:
    if where == "folder":
        save(tmp_path / "root" / "a" / "1.png", GREY)
        (tmp_path / "root" / "a" / "2.png").write_bytes(POSTSCRIPT)
        with pytest.raises(ValueError, match=r"cannot read .*2\.png"):
            from_folder(tmp_path / "root")
    else:
        if where.endswith("zip"):
            write_zip(tmp_path / "root", more={BAD: POSTSCRIPT})
        else:
            (write_folder(tmp_path / "root") / BAD).write_bytes(POSTSCRIPT)
        with pytest.raises(ValueError, match=r"cannot read .*0001_09\.png"):
            omniglot(tmp_path / "root", subset="background")
    assert not ghostscript.exists()


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", GREY)
    Image.new("1", (9000, 9000), 1).save(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match=r"cannot read .*2\.png \(9000x9000 pixels, more than 67,108,864\)"):
        from_folder(tmp_path, size=(4, 4))


def test_a_picture_taken_sideways_is_read_upright(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", GREY)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    turned = Image.fromarray(np.rot90(np.array(GREY, np.uint8)).copy())
    turned.save(tmp_path / "a" / "2.png", exif=exif)
    images = from_folder(tmp_path, ink="light", threshold=None).images[:, 0]
    assert images.tolist() == [GREY, GREY]


@pytest.mark.long
def test_an_archive_that_explodes_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    archive = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("images.npy", "w", force_zip64=True) as member:
        for _ in range(1100):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"cannot read .*a\.npz \(1,153,433,600 bytes when unpacked"):
        from_npz(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_a_file_name_moves_no_cursor(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", GREY)
    (tmp_path / "a" / "2\x1b[2J.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read") as caught:
        from_folder(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert r"2\x1b[2J.png" in str(caught.value)


@pytest.mark.parametrize("target", ["nothing", "1.png"])
def test_a_link_that_leads_nowhere_is_named(target: str, tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", GREY)
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "a" / target)
    with pytest.raises(ValueError, match=r"1\.png is a link that leads nowhere"):
        from_folder(tmp_path)


def test_from_npz_takes_unsigned_indices(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones((2, 5)), classes=np.array([1, 0], np.uint64))
    assert from_npz(tmp_path / "a.npz").classes.tolist() == [1, 0]
