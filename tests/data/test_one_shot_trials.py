"""Trials of the published layout and drawn ones."""

import numpy as np
import pytest
import torch

from pyro_vmem.data import FewShotDataset, one_shot_trials, within_alphabet_trials

Image = pytest.importorskip("PIL.Image", reason="reading images needs pillow")


def write_runs(root, runs=2, n_way=4):
    """Runs whose training image k and the test image of the same character have ink in row k alone."""
    for run in range(1, runs + 1):
        folder, lines = root / f"run{run:02}", []
        for number, character in enumerate(np.random.default_rng(run).permutation(n_way), 1):
            ink = np.ones((105, 105), bool)
            ink[15 * character] = False
            for name in (f"test/item{number:02}.png", f"training/class{character + 1:02}.png"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(ink).save(folder / name)
            lines.append(f"run{run:02}/test/item{number:02}.png run{run:02}/training/class{character + 1:02}.png")
        (folder / "class_labels.txt").write_text("\n".join(lines) + "\n")


def test_the_published_layout_is_read(tmp_path):
    write_runs(tmp_path)
    trials = one_shot_trials(tmp_path)
    assert len(trials) == 2
    for training, test, right in trials:
        assert training.shape == test.shape == (4, 1, 28, 28)
        assert training.unique().tolist() == [0, 1]
        torch.testing.assert_close(training[right], test)
        assert training[1].flatten(1).sum() > 0  # ink is 1, paper 0
    assert one_shot_trials(tmp_path, resize=None)[0].test.shape == (4, 1, 105, 105)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run01/test/item01.png", "expected two images of its run"),
        ("run01/test/item01.png ../../secret.png", "expected two images of its run"),
        ("run01/test/item01.png run02/training/class01.png", "expected two images of its run"),
        ("", "is empty"),
    ],
)
def test_labels_that_name_no_images_of_the_run_are_refused(tmp_path, line, words):
    write_runs(tmp_path)
    (tmp_path / "run01" / "class_labels.txt").write_text(line)
    with pytest.raises(ValueError, match=words):
        one_shot_trials(tmp_path)


def test_a_damaged_image_and_a_folder_without_runs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no runNN"):
        one_shot_trials(tmp_path)
    write_runs(tmp_path)
    (tmp_path / "run02" / "training" / "class03.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*class03"):
        one_shot_trials(tmp_path)


def dataset(alphabets=(5, 3), drawers=4):
    """Images whose three numbers are alphabet, character and drawer."""
    rows = [(a, c, d) for a, characters in enumerate(alphabets) for c in range(characters) for d in range(drawers)]
    characters = sorted({row[:2] for row in rows})
    classes = torch.tensor([characters.index(row[:2]) for row in rows])
    return FewShotDataset(torch.tensor(rows).float(), classes, alphabets=torch.tensor([a for a, _ in characters]))


def test_drawn_trials_are_of_one_alphabet_and_two_drawers():
    trials = within_alphabet_trials(dataset(), num_trials=40, n_way=3)
    for training, test, right in trials:
        assert len(training[:, 0].unique()) == 1
        assert len(training[:, 1].unique()) == 3
        assert torch.equal(training[right][:, :2], test[:, :2])
        assert len(training[:, 2].unique()) == len(test[:, 2].unique()) == 1
        assert training[0, 2] != test[0, 2]
    assert {int(trial.training[0, 0]) for trial in trials} == {0, 1}
    again = within_alphabet_trials(dataset(), num_trials=40, n_way=3)
    assert all(torch.equal(one.test, other.test) for one, other in zip(trials, again, strict=True))


def test_alphabets_that_are_too_small_are_left_out_or_refused():
    trials = within_alphabet_trials(dataset(), num_trials=10, n_way=5)
    assert {int(trial.training[0, 0]) for trial in trials} == {0}
    with pytest.raises(ValueError, match="at most the 5 characters"):
        within_alphabet_trials(dataset(), n_way=6)
    with pytest.raises(ValueError, match="two drawings"):
        within_alphabet_trials(dataset(drawers=1), n_way=3)
