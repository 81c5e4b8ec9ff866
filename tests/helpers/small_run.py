"""A run that takes milliseconds per step: a small data set, a small model, and what compares two runs."""

import torch

import pyro_vmem as pv
from pyro_vmem.data import EpisodeSampler, FewShotDataset
from pyro_vmem.train import load_checkpoint


def blobs(classes=16, drawings=6, seed=0):
    """Each class a random pattern, each drawing the pattern with a few pixels turned over."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.rand(classes, 1, 1, 8, 8, generator=generator) > 0.7
    flips = torch.rand(classes, drawings, 1, 8, 8, generator=generator) > 0.97
    images = (patterns ^ flips).flatten(0, 1).to(torch.uint8) * 255
    return FewShotDataset(images, torch.arange(classes).repeat_interleave(drawings))


def sampler(seed=0):
    return EpisodeSampler(blobs(seed=seed), n_way=6, k_shot=1, n_query=2, seed=seed)


def small_vma(seed=0, **kwargs):
    torch.manual_seed(seed)
    return pv.VMA.for_images((1, 8, 8), latent_dim=4, num_features=16, width=4, **kwargs)


def weights(vma):
    return {name: tensor.clone() for name, tensor in vma.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rows(history):
    """Records of a run without the time, in which alone two equal runs differ."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def kept(folder):
    """All that a folder's last checkpoint holds, without the time."""
    tensors, data = load_checkpoint(folder / "last.safetensors")
    data["result"] |= {"seconds": 0.0, "history": rows(data["result"]["history"])}
    return tensors, data


def same_state(one, two):
    """Whether the last checkpoints of two folders hold the same, bit for bit: weights, optimizer, random state, all."""
    (tensors, data), (others, other) = kept(one), kept(two)
    assert data == other
    return equal(tensors, others)
