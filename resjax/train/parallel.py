"""How training is spread over devices: sharded `jit`, or `pmap`.

The step is written once. Where it matters how many devices there are, it asks its backend: for this
device's share of a batch, for the mean of what the devices computed. Under `jit` the compiler sees
the global batch, so a share is a sharding constraint and a mean is there already; under `pmap` they
are a slice and a collective. Both train alike: the same draws for the same images, the same BN
statistics.

`pmap` is in maintenance mode since jax 0.8; it is here because people ask for it, and because it
proves the other.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Key

from resjax.config import Config
from resjax.config import Parallel as ParallelConfig
from resjax.errors import UserError
from resjax.xla.compile_options import quick_compile

Tree = TypeVar("Tree")


class Backend(Protocol):
    """What a step and a program ask of the devices."""

    devices: int

    # Within the compiled step.
    def share(self, tree: Tree) -> Tree:
        """This device's part of arrays whose leading axis is the global batch."""

    def take(self, rows: Tree, chosen: Int[Array, "batch"]) -> Tree:
        """This device's part of a batch, from what `rows` gave."""

    def mean(self, tree: Tree) -> Tree:
        """Over the devices, of what each computed from its share."""

    def sum(self, tree: Tree) -> Tree:
        """Over the devices, likewise."""

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        """For draws whose shape is that of a share: another on every device."""

    def norm_options(self) -> dict[str, Any]:
        """Of `BatchNorm`: which devices share statistics."""

    # Around it.
    def rows(self, tree: Any) -> Any:
        """A dataset's arrays, each device holding its part of the examples."""

    def batches(self, tree: Any) -> Any:
        """Batches (parts, batch, ...) from this host's arrays (parts, the host's share, ...)."""

    def one(self, state: Any) -> Any:
        """A state as a checkpoint holds it: one copy."""

    def spread(self, state: Any) -> Any:
        """The inverse of `one`."""

    def compile_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        """`init(key)` gives a state, `spread` already."""

    def compile_kept(self, init: Callable[[Any], Any], params: Any) -> Callable[..., Any]:
        """`init(params)` gives what an optimiser keeps of parameters of such shapes."""

    def compile_steps(self, take: Callable[..., Any], steps: int) -> Any:
        """`take(state, split, steps=steps)` gives a state and metrics; has `lower`."""

    def compile_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate(state, split)` gives metrics."""


class Jit:
    """Sharded `jit` over a mesh of two axes: `data`, and `shard` for the parameters.

    The batch is sharded over both. With one device along `shard` every device holds all
    parameters; with more, each holds its part of parameters and optimiser state (FSDP).
    """

    AXES = ("data", "shard")

    def __init__(self, config: ParallelConfig):
        self.devices = jax.device_count()
        shards = config.shard_parameters
        if self.devices % shards:
            raise UserError(
                f"parallel.shard_parameters={shards} does not divide {self.devices} devices"
            )
        shape = (self.devices // shards, shards)
        self.mesh = jax.make_mesh(shape, self.AXES, axis_types=(AxisType.Auto,) * 2)
        self._shards = shards
        self._bn_groups = self.devices // _norm_devices(config, self.devices)

    def share(self, tree: Tree) -> Tree:
        return lax.with_sharding_constraint(tree, self._sharding(self.AXES))

    def take(self, rows: Tree, chosen: Int[Array, "batch"]) -> Tree:
        taking = partial(_take, axis=self.AXES, devices=self.devices)
        specs = (PartitionSpec(self.AXES), PartitionSpec())
        return jax.shard_map(taking, mesh=self.mesh, in_specs=specs, out_specs=specs[0])(
            rows, chosen
        )

    def mean(self, tree: Tree) -> Tree:
        return tree

    def sum(self, tree: Tree) -> Tree:
        return tree

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        return key

    def norm_options(self) -> dict[str, Any]:
        return {"groups": self._bn_groups}

    def rows(self, tree: Any) -> Any:
        sharding = self._sharding(self.AXES)
        return jax.tree.map(
            lambda leaf: jax.device_put(_filled(leaf, self.devices), sharding), tree
        )

    def batches(self, tree: Any) -> Any:
        sharding = self._sharding(None, self.AXES)
        return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), tree)

    def one(self, state: Any) -> Any:
        return state

    def spread(self, state: Any) -> Any:
        return state

    def compile_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        layout = self._layout(jax.eval_shape(init, jax.random.key(0)))
        return jax.jit(init, out_shardings=layout, compiler_options=quick_compile())

    def compile_kept(self, init: Callable[[Any], Any], params: Any) -> Callable[..., Any]:
        layout = jax.tree.map(self._in_parts, jax.eval_shape(init, params))
        return jax.jit(init, out_shardings=layout)

    def compile_steps(self, take: Callable[..., Any], steps: int) -> Any:
        def taken(state: Any, split: Any) -> Any:
            new, metrics = take(state, split, steps=steps)
            layout = (self._layout(new), jax.tree.map(lambda _: self._sharding(), metrics))
            return lax.with_sharding_constraint((new, metrics), layout)

        return jax.jit(taken, donate_argnums=0)

    def compile_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(evaluate, out_shardings=self._sharding())

    def _sharding(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def _layout(self, state: Any) -> Any:
        """Parameters, and what the optimiser keeps of each, in parts; the rest everywhere."""
        layout = jax.tree.map(lambda _: self._sharding(), state)
        parts = {
            name: jax.tree.map(self._in_parts, getattr(state, name))
            for name in ("params", "optimizer", "average")
        }
        return layout._replace(**parts)

    def _in_parts(self, leaf: Any) -> NamedSharding:
        for axis in reversed(range(leaf.ndim)):
            if self._shards > 1 and leaf.shape[axis] % self._shards == 0:
                return self._sharding(*[None] * axis, "shard")
        return self._sharding()


class Pmap:
    """`pmap` over all devices; every device holds a copy of the state."""

    AXIS = "batch"

    def __init__(self, config: ParallelConfig):
        if config.shard_parameters > 1:
            raise UserError(
                f"parallel.shard_parameters={config.shard_parameters} needs parallel.backend=jit"
            )
        self.devices = jax.device_count()
        self._local = Mesh(np.array(jax.local_devices()), (self.AXIS,))
        self._mapped = NamedSharding(self._local, PartitionSpec(self.AXIS))
        self._together = _norm_devices(config, self.devices)

    def share(self, tree: Tree) -> Tree:
        def own(whole: Array) -> Array:
            size = len(whole) // self.devices
            return lax.dynamic_slice_in_dim(whole, lax.axis_index(self.AXIS) * size, size)

        return jax.tree.map(own, tree)

    def take(self, rows: Tree, chosen: Int[Array, "batch"]) -> Tree:
        return _take(rows, chosen, axis=self.AXIS, devices=self.devices)

    def mean(self, tree: Tree) -> Tree:
        return lax.pmean(tree, self.AXIS)

    def sum(self, tree: Tree) -> Tree:
        return lax.psum(tree, self.AXIS)

    def own_key(self, key: Key[Array, ""]) -> Key[Array, ""]:
        return jax.random.fold_in(key, lax.axis_index(self.AXIS))

    def norm_options(self) -> dict[str, Any]:
        if self._together == 1:
            return {}
        if self._together == self.devices:
            return {"axis_name": self.AXIS}
        groups = np.arange(self.devices).reshape(-1, self._together).tolist()
        return {"axis_name": self.AXIS, "axis_index_groups": groups}

    def rows(self, tree: Any) -> Any:
        first = jax.process_index() * self._local.size

        def own(leaf: np.ndarray) -> Array:
            filled = _filled(leaf, self.devices)
            parts = filled.reshape(self.devices, -1, *leaf.shape[1:])
            return jax.device_put(parts[first : first + self._local.size], self._mapped)

        return jax.tree.map(own, tree)

    def batches(self, tree: Any) -> Any:
        def own(leaf: np.ndarray) -> Array:
            parts = leaf.reshape(len(leaf), self._local.size, -1, *leaf.shape[2:])
            return jax.device_put(parts.swapaxes(0, 1), self._mapped)

        return jax.tree.map(own, tree)

    def one(self, state: Any) -> Any:
        first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], state)
        if jax.process_count() == 1:
            return first
        # Orbax saves what all processes know to be the same.
        together = NamedSharding(Mesh(np.array(jax.devices()), (self.AXIS,)), PartitionSpec())
        return jax.tree.map(lambda leaf: _everywhere(leaf, together), first)

    def spread(self, state: Any) -> Any:
        # A restored state is tied to the device where it lies.
        here = NamedSharding(self._local, PartitionSpec())
        state = jax.device_put(jax.tree.map(_on_this_host, state), here)
        count = self._local.size

        @partial(jax.jit, out_shardings=self._mapped)
        def copies(tree: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)

        return copies(state)

    def compile_init(self, init: Callable[..., Any]) -> Callable[..., Any]:
        once = jax.jit(init, compiler_options=quick_compile())
        return lambda key: self.spread(once(key))

    def compile_kept(self, init: Callable[[Any], Any], params: Any) -> Callable[..., Any]:
        return jax.pmap(init, self.AXIS)

    def compile_steps(self, take: Callable[..., Any], steps: int) -> Any:
        return jax.pmap(partial(take, steps=steps), self.AXIS, out_axes=(0, None), donate_argnums=0)

    def compile_evaluate(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        return jax.pmap(evaluate, self.AXIS, out_axes=None)


def backend(config: Config) -> Backend:
    """The backend of a config, on the devices found.

    Raises:
      UserError: the batch, or a group of BN, does not divide among them.
    """
    made = (Jit if config.parallel.backend == "jit" else Pmap)(config.parallel)
    mixes = config.data.mixup or config.data.cutmix  # neighbours, on one device and in one part
    unit = made.devices * config.train.accumulation_steps * (2 if mixes else 1)
    if rest := config.data.batch_size % unit:
        below = config.data.batch_size - rest
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        parts = f"{made.devices} devices"
        if config.train.accumulation_steps > 1:
            parts += f" and {config.train.accumulation_steps} accumulated parts"
        if mixes:
            parts += ", into pairs of images to mix"
        raise UserError(
            f"data.batch_size={config.data.batch_size} does not divide among {parts}; "
            f"nearest: {near}"
        )
    return made


def device_memory() -> int | None:
    """Bytes that a run may use on one device; None where nobody says.

    Of an accelerator, what its allocator may take. On a CPU, what the system and the container have
    left for all devices together.
    """
    if statistics := jax.local_devices()[0].memory_stats():
        return statistics.get("bytes_limit")
    if jax.default_backend() != "cpu" or not (system := Path("/proc/meminfo")).is_file():
        return None
    rooms = [1024 * int(re.findall(r"MemAvailable:\s+(\d+)", system.read_text())[0])]
    container = Path("/sys/fs/cgroup")  # version 2
    if (most := container / "memory.max").is_file() and (text := most.read_text().strip()) != "max":
        rooms.append(int(text) - int((container / "memory.current").read_text()))
    return min(rooms) // jax.local_device_count()


def _take(rows: Any, chosen: Int[Array, "batch"], axis: Any, devices: int) -> Any:
    """The chosen rows, of which each device holds some and gets some.

    Every device looks up the whole batch among its own rows; of what they find, zeros for the rows
    of others, each gets the sum of its share.
    """

    def take(own: Array) -> Array:
        if devices == 1:
            return own[chosen]
        place = chosen - lax.axis_index(axis) * len(own)
        here = (place >= 0) & (place < len(own))
        found = own[jnp.clip(place, 0, len(own) - 1)]
        masked = jnp.where(here.reshape(-1, *[1] * (own.ndim - 1)), found, 0)
        return lax.psum_scatter(masked, axis, tiled=True)

    return jax.tree.map(take, rows)


def _filled(leaf: np.ndarray, devices: int) -> np.ndarray:
    """With rows of zeros at the end, so that all devices get as many."""
    return np.pad(leaf, [(0, -len(leaf) % devices), *[(0, 0)] * (leaf.ndim - 1)])


def _everywhere(leaf: Array, sharding: NamedSharding) -> Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_everywhere(jax.random.key_data(leaf), sharding))
    return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))


def _on_this_host(leaf: Any) -> Any:
    whole = not isinstance(leaf, Array) or leaf.is_fully_addressable
    return leaf if whole else leaf.addressable_shards[0].data


def _norm_devices(config: ParallelConfig, devices: int) -> int:
    together = config.bn_devices or devices
    if devices % together:
        near = [size for size in range(1, devices + 1) if devices % size == 0]
        raise UserError(
            f"parallel.bn_devices={together} does not divide {devices} devices; valid: "
            f"{', '.join(map(str, near))}, and 0 for all"
        )
    return together
