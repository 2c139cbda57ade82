"""Figures of TPU chips, as their makers publish them, and the shapes in which they are rented: one table, with sources.

Sources, read in November 2026:
  flops, hbm_bandwidth   docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak compute (bf16), HBM bandwidth
  hbm_bytes              what the compiler says is available (libtpu 0.0.50), which is less than what is built in
  ici, dcn               jax-ml.github.io/scaling-book/tpus, "TPU specs": a link in both directions, and DCN egress; the
                         product pages state the wire rate of ICI, some 10 % more than a collective reaches
  clock                  derived: flops / (multiply-adds of all matrix units x 2). It turns the compiler's cycles into
                         the product pages' figures: a large matrix product then reaches 70 to 93 % of `flops`, and a
                         large addition 72 to 81 % of `hbm_bandwidth`
  shapes, wraparound     the same product pages, "Configurations"
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of TPU, by what JAX calls a device: a chip, or of tpu7x half of one.

    Attributes:
      kind: what `device_kind` starts with.
      hbm_bytes: memory that a program can use.
      hbm_bandwidth: bytes/s.
      flops: dense bfloat16 FLOP/s.
      clock: cycles/s of the compiler's estimates.
      ici: bytes/s of one axis of the torus, both directions together.
      dcn: bytes/s to other slices.
      torus: 2 or 3 axes.
      largest: the largest slice, its shape.
      devices_per_chip: 2 where each core is a device.
    """

    kind: str
    hbm_bytes: int
    hbm_bandwidth: float
    flops: float
    clock: float
    ici: float
    dcn: float
    torus: int
    largest: tuple[int, ...]
    devices_per_chip: int = 1

    def wraps(self, size: int, shape: tuple[int, ...]) -> bool:
        """Whether an axis of `size` of a slice of `shape` closes to a ring.

        In two dimensions only a full axis does, of 16; in three, every axis of whole cubes of 4 x 4 x 4.
        """
        return size == 16 if self.torus == 2 else all(s % 4 == 0 for s in shape)


_GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", int(30.75 * _GIB), 1228e9, 275e12, 1.05e9, 9e10, 6.25e9, 3, (12, 16, 16)),
    "v5e": Chip("TPU v5 lite", int(15.75 * _GIB), 819e9, 197e12, 1.5e9, 9e10, 3.125e9, 2, (16, 16)),
    "v5p": Chip("TPU v5", int(95.73 * _GIB), 2765e9, 459e12, 1.75e9, 1.8e11, 6.25e9, 3, (16, 16, 24)),
    "v6e": Chip("TPU v6 lite", int(31.24 * _GIB), 1638e9, 918e12, 1.75e9, 1.8e11, 12.5e9, 2, (16, 16)),
    "tpu7x": Chip("TPU7x", int(94.74 * _GIB), 3690e9, 1153.5e12, 2.2e9, 1.8e11, 6.25e9, 3, (16, 24, 24), 2),
}
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # smaller than a cube; from there on, whole cubes


def slice_shape(topology: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the shape of a slice that 'v5e:16x16' names.

    Raises:
      ValueError: there is no such slice; lists those that there are.
    """
    name, _, sizes = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"topology {topology!r} does not exist; there are {'; '.join(map(_shapes, CHIPS))}; and cpu:N")
    chip = CHIPS[name]
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
    except ValueError:
        shape = ()
    cubes = all(size >= 4 and size % 4 == 0 for size in shape) and shape == tuple(sorted(shape))
    small = shape in (_SHAPES_2D if chip.torus == 2 else _SHAPES_3D)
    if len(shape) != chip.torus or not (small or (chip.torus == 3 and cubes)) or not _within(shape, chip.largest):
        raise ValueError(f"topology {topology!r} does not exist; of {name} there are {_shapes(name)}")
    return chip, shape


def _within(shape: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    return all(size <= most for size, most in zip(shape, largest, strict=True))


def _shapes(name: str) -> str:
    chip = CHIPS[name]
    shapes = ["x".join(map(str, shape)) for shape in (_SHAPES_2D if chip.torus == 2 else _SHAPES_3D)]
    if chip.torus == 3:
        shapes.append(f"AxBxC of multiples of 4, A <= B <= C, up to {'x'.join(map(str, chip.largest))}")
    return f"{name}:" + ", ".join(shapes)
