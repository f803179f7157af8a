"""Stage 3 of ZeRO: the parameters are sharded too. A layer's are whole only while it computes.

    forward    gather 1, compute 1, let go | gather 2, compute 2, let go | ...
    backward   ... | gather 2, compute 2, let go, reduce-scatter 2's gradients | gather 1, ...

Between two uses a rank has 1/P of each layer. "Let go" drops the references: where the graph has saved a parameter,
what brings it back stands in its place (`Tensor._bring`); where it has saved something computed from one (a transpose,
say) that keeps the memory alive until backward has used it.

Source  Rajbhandari et al. 2020, ZeRO, section 5.3; Zhao et al. 2023, PyTorch FSDP, section 3
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

from ..backend import Array
from ..collectives import all_gather, chunk_slice
from ..comm import Communicator
from ..nn import Module
from ..optim.optimizer import Part
from .buckets import owners_of
from .meter import Meter


class Layer:
    """One module's own parameters (of one dtype and group), of which this rank keeps its chunk."""

    def __init__(self, number: int, part: Part, layers: Layers):
        self.number, self.part, self.layers = number, part, layers
        mine = chunk_slice(part.flat.size, layers.comm.size, layers.comm.rank)
        part.put(part.flat.data[mine].copy())
        self.mine = mine
        for i, p in enumerate(part.flat.parameters):
            p._bring = partial(self._bring, i)
        part.flat.release_data()

    def gather(self) -> None:
        """Have all of it. Every rank calls it.   Cost: n (P-1)/P bytes a rank, of n bytes"""
        flat, layers = self.part.flat, self.layers
        if flat.data is not None:
            return
        flat.check()
        with layers.meter.waiting(), layers.comm.step("D.3(3) gather a layer"):
            data = flat.claim_data()
            data[self.mine] = self.part.own_data
            all_gather(layers.comm, data, layers.algorithm)
        layers.meter.weigh()
        layers.gathered = zlib.crc32(self.number.to_bytes(4, "little"), layers.gathered)

    def release(self) -> None:
        """Keep this rank's chunk only."""
        if self.part.flat.data is not None:
            self.part.flat.release_data()

    def _bring(self, i: int) -> Array:
        """Parameter i, for backward, which needs no other layer now."""
        if self.layers.brought is not self:
            self.layers.release(self.layers.brought)
            self.layers.brought = self
        self.gather()
        return self.part.flat.parameters[i].data


class Layers:
    """All layers of a model; makes each whole just before its module's forward, and lets go of it just after.

    gathered  a checksum over the layers gathered so far in this step, in their order: ranks whose checksums differ have
              gone through different layers, and got parameters of the one for those of the other
    """

    def __init__(self, model: Module, parts: list[Part], comm: Communicator, algorithm: str, meter: Meter):
        owner = owners_of(model)
        strange = [p.shape for part in parts for p in part.flat.parameters if p not in owner]
        if strange:  # before anything is let go of
            raise ValueError(f"zero=3: the optimizer has parameters that the model has not, of shapes {strange}")
        self.comm, self.algorithm, self.meter = comm, algorithm, meter
        self.gathered = 0
        self.brought: Layer | None = None  # the layer that backward has asked for last
        self.all = [Layer(number, part, self) for number, part in enumerate(parts)]
        self._whole = 0  # how many `with whole()` we are in
        self._of = {id(layer.part): layer for layer in self.all}
        of_module: dict[Module, list[Layer]] = {}
        for layer in self.all:
            of_module.setdefault(owner[layer.part.flat.parameters[0]], []).append(layer)
        for module, layers in of_module.items():
            module.register_forward_pre_hook(partial(self._before, layers))
            module.register_forward_hook(partial(self._after, layers))

    def _before(self, layers: list[Layer], *_: Any) -> None:
        for layer in layers:
            layer.gather()

    def _after(self, layers: list[Layer], *_: Any) -> None:
        for layer in layers:
            self.release(layer)

    def of(self, part: Part) -> Layer:
        return self._of[id(part)]

    def gather(self) -> None:
        """Have the whole model, and let the optimizer work in it."""
        self._whole += 1
        if self._whole == 1:
            self._before(self.all)
            for layer in self.all:
                layer.part.put(layer.part.flat.data[layer.mine])

    def scatter(self) -> None:
        """Take over what the parameters are now, and keep this rank's chunks only."""
        self._whole -= 1
        if not self._whole:
            try:
                for layer in self.all:
                    layer.part.flat.check()
            finally:
                for layer in self.all:
                    layer.part.put(layer.part.flat.data[layer.mine].copy())
                    layer.release()

    def release(self, layer: Layer | None) -> None:
        """Let go of a layer, but in `with whole()`."""
        if layer is not None and not self._whole:
            layer.release()

    def release_all(self) -> None:
        """A backward is over, or a forward or backward has failed."""
        self.brought = None
        for layer in self.all:
            self.release(layer)
