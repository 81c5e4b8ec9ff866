"""FewShotDataset: what it accepts, how it splits, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyro_vmem.data import FewShotDataset, from_npz


def numbered(sizes: list[int], alphabets: list[int] | None = None) -> FewShotDataset:
    """A data set whose images are all different: image i holds the value i everywhere."""
    n = sum(sizes)
    images = torch.arange(n, dtype=torch.float32)[:, None, None, None].expand(n, 1, 4, 4).contiguous()
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    return FewShotDataset(
        images[shuffled],
        classes[shuffled],
        [f"class{i}" for i in range(len(sizes))],
        None if alphabets is None else torch.tensor(alphabets),
        None if alphabets is None else [f"alphabet{i}" for i in range(max(alphabets) + 1)],
    )


def values(dataset: FewShotDataset) -> set[int]:
    return {int(v) for v in dataset.images.flatten(1)[:, 0]}


def test_sizes_and_repr() -> None:
    dataset = numbered([3, 5, 4], [0, 1, 0])
    assert len(dataset) == 12
    assert dataset.num_classes == 3
    assert dataset.image_shape == (1, 4, 4)
    assert dataset.class_sizes.tolist() == [3, 5, 4]
    assert repr(dataset) == (
        "FewShotDataset(12 images of shape (1, 4, 4), 3 classes, 2 alphabets, 3..5 drawings per class)"
    )


def test_to_float_scales_bytes_only() -> None:
    assert FewShotDataset.to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [
        0.0,
        pytest.approx(0.2),
        1.0,
    ]
    grey = FewShotDataset.to_float(torch.tensor([-2.0, 300.0], dtype=torch.float64))
    assert grey.dtype == torch.float32
    assert grey.tolist() == [-2.0, 300.0]


def test_subset_renumbers_in_the_order_given() -> None:
    dataset = numbered([3, 5, 4, 2], [0, 1, 2, 1]).subset([3, 0])
    assert dataset.class_names == ["class3", "class0"]
    assert dataset.alphabet_names == ["alphabet0", "alphabet1"]
    assert dataset.alphabets.tolist() == [1, 0]
    assert {int(v) for v in dataset.images[dataset.classes == 0].flatten(1)[:, 0]} == {12, 13}
    assert values(dataset) == {0, 1, 2, 12, 13}


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([], "expected a tensor of dtype Integer"),
        ([0.5], "expected a tensor of dtype Integer"),
        ([[0]], "expected a tensor of dtype Integer"),
        ([0, 3], r"got values 0\.\.3, expected 0 to 2"),
        ([-1], r"got values -1\.\.-1, expected 0 to 2"),
        ([1, 1], "more than once"),
    ],
)
def test_subset_refuses(chosen: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"class_indices: .*{message}"):
        numbered([2, 2, 2]).subset(chosen)


@pytest.mark.parametrize("by", ["alphabet", "class"])
@pytest.mark.parametrize("seed", range(5))
def test_split_is_disjoint_complete_and_near_the_share(by: str, seed: int) -> None:
    dataset = numbered([2] * 40, [i // 4 for i in range(40)])
    train, test = dataset.split(by=by, test=0.3, seed=seed)  # type: ignore[arg-type]
    assert not set(train.class_names) & set(test.class_names)
    assert set(train.class_names) | set(test.class_names) == set(dataset.class_names)
    assert values(train) | values(test) == values(dataset)
    assert not values(train) & values(test)
    assert test.num_classes == 12
    if by == "alphabet":
        assert not set(train.alphabet_names) & set(test.alphabet_names)
    again = dataset.split(by=by, test=0.3, seed=seed)[1]  # type: ignore[arg-type]
    assert again.class_names == test.class_names
    assert torch.equal(again.images, test.images)


def test_split_depends_on_the_seed() -> None:
    dataset = numbered([1] * 40, list(range(40)))
    assert len({tuple(dataset.split(test=0.25, seed=seed)[1].class_names) for seed in range(5)}) == 5


def test_split_passes_over_an_alphabet_too_large_for_the_share() -> None:
    dataset = numbered([1] * 20, [0] * 8 + [1, 2, 3, 4] * 3)
    for seed in range(6):
        assert dataset.split(test=0.3, seed=seed)[1].num_classes == 6
        # No alphabet comes nearer to 1 % than none at all would; the smallest is the least wrong.
        assert dataset.split(test=0.01, seed=seed)[1].num_classes == 3


def test_split_by_name() -> None:
    dataset = numbered([2] * 6, [0, 0, 1, 1, 2, 2])
    train, test = dataset.split(test=["alphabet2", "alphabet0"])
    assert train.alphabet_names == ["alphabet1"]
    assert test.class_names == ["class0", "class1", "class4", "class5"]
    assert dataset.split(by="class", test=["class3"])[1].class_names == ["class3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "script"}, r"by: expected 'alphabet' or 'class', got 'script'"),
        ({"test": "alphabet0"}, r"test: expected a number in \(0, 1\) or Sequence\[str\], got 'alphabet0'"),
        ({"test": ["Klingon"]}, "test: got 'Klingon', expected names of alphabet groups such as 'alphabet0'"),
        ({"test": ["alphabet0", "alphabet0"]}, "expected each name once"),
        ({"test": []}, "test: got 0 of 2 names"),
        ({"test": ["alphabet0", "alphabet1"]}, "test: got 2 of 2 names"),
        ({"test": 0.0}, r"test: expected a number in \(0, 1\) or Sequence\[str\], got 0\.0"),
        ({"test": 1.0}, r"test: expected a number in \(0, 1\) or Sequence\[str\], got 1\.0"),
    ],
)
def test_split_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered([2] * 4, [0, 0, 1, 1]).split(**arguments)  # type: ignore[arg-type]


def test_split_of_one_alphabet_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"both sides of a split need one\. Use by='class'"):
        numbered([2] * 4).split()
    with pytest.raises(ValueError, match=r"one class .* Add classes"):
        numbered([2]).split(by="class")


IMAGES = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
CLASSES = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(4)}, r"images: got shape \(4,\)"),
        ({"images": IMAGES[:0], "classes": CLASSES[:0]}, "images: got shape .* at least one"),
        ({"images": IMAGES.long()}, r"images: got torch\.int64, expected torch\.uint8 in 0\.\.255"),
        ({"images": IMAGES + 1}, r"images: got uint8 values 0 and 1, expected 0\.\.255"),
        ({"images": IMAGES / 0}, "images: got NaN or infinite"),
        (
            {"classes": CLASSES[:3]},
            r"classes: expected a tensor of dtype Integer .*\(3,\), where images has shape \(4, 1, 2, 2\)",
        ),
        (
            {"classes": CLASSES.float()},
            r"classes: expected a tensor of dtype Integer .*torch\.float32.*Use classes\.long\(\)",
        ),
        ({"classes": CLASSES * 2}, r"classes: class 1 \('1'\) is empty"),
        ({"classes": CLASSES - 1}, r"classes: got indices -1\.\.0"),
        ({"class_names": ["a"]}, r"classes: got indices 0\.\.1, expected 0 to 0"),
        ({"class_names": ["a", "b", "c"]}, r"classes: class 2 \('c'\) is empty"),
        ({"class_names": ["a", "a"]}, "class_names: got 'a' more than once"),
        ({"alphabets": torch.zeros(3).long()}, r"alphabets: got shape \(3,\), expected \(2,\)"),
        ({"alphabets": torch.tensor([0, 2])}, r"alphabets: alphabet 1 \('1'\) is empty"),
        ({"alphabet_names": ["x", "y"]}, r"alphabets: alphabet 1 \('y'\) is empty"),
    ],
)
def test_refuses_what_does_not_agree(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotDataset(**{"images": IMAGES, "classes": CLASSES, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("event", [(5,), (2, 3, 4)])
def test_save_npz_round_trip(dtype: torch.dtype, event: tuple[int, ...], tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, *event), generator=torch.Generator().manual_seed(0)).to(dtype)
    dataset = FewShotDataset(
        images, torch.tensor([2, 0, 1, 1, 0, 2]), ["b", "ä", "c"], torch.tensor([1, 0, 1]), ["z", "y"]
    )
    dataset.save_npz(tmp_path / "new" / "data.npz")
    read = from_npz(tmp_path / "new" / "data.npz")
    assert torch.equal(read.images, images.float() if dtype == torch.bfloat16 else images)
    assert read.images.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(read.classes, dataset.classes)
    assert torch.equal(read.alphabets, dataset.alphabets)
    assert (read.class_names, read.alphabet_names) == (["b", "ä", "c"], ["z", "y"])


def test_save_npz_leaves_the_old_file_if_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = numbered([2, 2])
    path = tmp_path / "data.npz"
    dataset.save_npz(path)
    before = path.read_bytes()

    def fail_halfway(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr("numpy.savez_compressed", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        dataset.save_npz(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]
