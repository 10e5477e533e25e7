"""Written samples as lists, to be changed and written back behind the program's back."""

import itertools

import numpy as np

from sft.arrays import SPLITS, file_name


class Sample:
    """A written sample, to be changed."""

    def __init__(self, ids, labels, weights, origin):
        self.ids, self.labels, self.weights, self.origin = list(ids), list(labels), list(weights), list(origin)

    @property
    def trained(self):
        return [at for at, label in enumerate(self.labels) if label >= 0]

    @property
    def starts(self):
        """Where the blocks begin; <|im_start|> has the id 1."""
        return [at for at, i in enumerate(self.ids) if i == 1]

    def train(self, *places, on=True):
        for at in places:
            self.labels[at] = self.ids[at] if on else -100

    def replace(self, at, other):
        self.ids[at] = other
        self.labels[at] = other if self.labels[at] >= 0 else -100

    def append(self, span):
        for each in (self.ids, self.labels, self.weights):
            each.extend(each[span])

    def remove(self, span):
        for each in (self.ids, self.labels, self.weights):
            del each[span]

    def copy(self):
        return Sample(self.ids, self.labels, self.weights, self.origin)


def read_samples(folder):
    """{split: samples}, with weights of 1 where there is no such file."""
    samples = {}
    for split in SPLITS:
        ids, labels, offsets, origins = (
            np.load(folder / file_name(split, part)) for part in ("input_ids", "labels", "offsets", "origins")
        )
        path = folder / file_name(split, "weights")
        weights = np.load(path) if path.exists() else (labels >= 0).astype(np.float32)
        spans = [slice(a, b) for a, b in itertools.pairwise(offsets)]
        samples[split] = [
            Sample(ids[span], labels[span], weights[span], origin)
            for span, origin in zip(spans, origins.tolist(), strict=True)
        ]
    return samples


def write_samples(folder, samples, *, weights):
    for path in folder.glob("*_weights.npy"):
        path.unlink()
    for split, of_split in samples.items():
        arrays = {
            "input_ids": np.array([i for sample in of_split for i in sample.ids], "<i4"),
            "labels": np.array([i for sample in of_split for i in sample.labels], "<i4"),
            "offsets": np.cumsum([0, *(len(sample.ids) for sample in of_split)], dtype="<i8"),
            "origins": np.array([sample.origin for sample in of_split], "<i8").reshape(-1, 3),
        }
        if weights:
            arrays["weights"] = np.array([weight for sample in of_split for weight in sample.weights], "<f4")
        for part, array in arrays.items():
            np.save(folder / file_name(split, part), array)
