"""From a folder of safetensors to weights in memory, one block of rows at a time.

The reader here is our own because of memory: it never holds more than one block of a matrix besides what is kept, so the peak
at load is the finished weights and a few megabytes (an mmap of the files would count into the resident size, and a state
dict would double it).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec
import torch
from torch import Tensor

from hubpeer.errors import SettingsError, Unavailable

log = logging.getLogger("hubpeer.model")

Kind = Literal["int8", "bf16", "fp32"]
DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8}
NAMES: Final = {v: k for k, v in DTYPES.items()}
#: Numbers of a matrix handled at once while loading: 2 MiB in fp32, so that the passes of quantization stay in the cache and
#: the allocator hands the same pages out again.
BLOCK: Final = 1 << 19


# ── the shape ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Shape(msgspec.Struct, frozen=True):
    """What of a Llama's config.json the forward pass needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    eps: float
    theta: float
    scaling: dict[str, Any] | None
    context: int
    tied: bool
    stops: tuple[int, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        """Of keys and values together, at two bytes a number."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


def read_shape(folder: Path) -> Shape:
    """The shape of the model in `folder`; raises `SettingsError` where it is no Llama we can run."""
    config = _json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise SettingsError(f"{folder} holds a {config.get('model_type')!r} model; hubpeer runs models of the type 'llama'")
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, wanted) != wanted:
            raise SettingsError(f"{folder}/config.json: {key} = {config[key]!r} is not supported, only {wanted!r}")
    # Rope stands in one table since transformers 5 and in two keys before.
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "llama3":
        raise SettingsError(f"{folder}/config.json: rope scaling {scaling!r} is not supported, only 'llama3'")
    heads = int(config["num_attention_heads"])
    stops = config.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        stops = _json(generation).get("eos_token_id", stops)
    return Shape(
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        inner=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        scaling=scaling,
        context=int(config.get("max_position_embeddings", 2048)),
        tied=bool(config.get("tie_word_embeddings", False)),
        stops=tuple(stops) if isinstance(stops, list) else () if stops is None else (int(stops),),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as exc:
        raise SettingsError(f"{path} is missing: model.name must be a folder with a model in the Hugging Face layout") from exc
    except (OSError, ValueError) as exc:
        raise SettingsError(f"{path} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise SettingsError(f"{path} is not a JSON object")
    return value


def rope_frequencies(shape: Shape) -> Tensor:
    """[head_dim / 2], as Llama 3 stretches them: long waves by `factor`, short ones not, a ramp between."""
    inverse = 1.0 / shape.theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    if shape.scaling is None:
        return inverse
    factor, old = float(shape.scaling["factor"]), float(shape.scaling["original_max_position_embeddings"])
    low, high = float(shape.scaling["low_freq_factor"]), float(shape.scaling["high_freq_factor"])
    wave = 2 * math.pi / inverse
    ramp = ((old / wave - low) / (high - low)).clamp(0, 1)
    return inverse / factor * (1 - ramp) + inverse * ramp


# ── reading safetensors ─────────────────────────────────────────────────────────────────────────────────────────────────


class Stored(msgspec.Struct, frozen=True):
    """Where one tensor lies."""

    file: int  # descriptor
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        size: int = self.dtype.itemsize
        return size * math.prod(self.shape[1:])


class Tensors:
    """The tensors of a folder's safetensors files, read by rows. The files stay open until `close`."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._descriptors: list[int] = []
        self._stored: dict[str, Stored] = {}
        self.identity = hashlib.sha256()  # of what was opened: names, sizes, times and headers
        self.content = hashlib.sha256()  # of sizes, headers and a sample of each file: which weights, wherever they lie
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            size = os.fstat(descriptor).st_size
            length = struct.unpack("<Q", os.pread(descriptor, 8, 0) or b"\0" * 8)[0]
            if not 2 <= length <= min(size - 8, 100 << 20):
                raise SettingsError(f"{path} is not a safetensors file, or was cut off")
            raw = os.pread(descriptor, length, 8)
            header = json.loads(raw)
            stat = os.fstat(descriptor)
            self.identity.update(f"{path.name} {size} {stat.st_mtime_ns}".encode() + raw)
            self.content.update(f"{size}".encode() + raw + os.pread(descriptor, 1 << 16, size // 2))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                if 8 + length + end > size:
                    raise SettingsError(f"{path} ends before its tensor {name}; download it again")
                if entry["dtype"] not in DTYPES:
                    raise SettingsError(f"{path}: {name} is stored as {entry['dtype']}; supported: {', '.join(DTYPES)}")
                self._stored[name] = Stored(descriptor, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))

    @classmethod
    def of_folder(cls, folder: Path) -> Tensors:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(_json(index)["weight_map"].values()))
            files = [folder / name for name in names]
        else:
            files = [folder / "model.safetensors"]
        for file in files:
            if not file.is_file():
                raise SettingsError(f"{file} is missing; hubpeer reads weights in the safetensors format")
        return cls(files)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Stored:
        try:
            return self._stored[name]
        except KeyError:
            raise SettingsError(f"the model's files hold no tensor {name}") from None

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, as stored."""
        stored = self[name]
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        buffer = bytearray((stop - start) * stored.row_bytes)
        _read_exactly(stored.file, memoryview(buffer), stored.offset + start * stored.row_bytes)
        return torch.frombuffer(buffer, dtype=stored.dtype).view(stop - start, *stored.shape[1:])

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _read_exactly(descriptor: int, into: memoryview, offset: int) -> None:
    while into:
        count = os.preadv(descriptor, [into], offset)
        if count == 0:
            raise Unavailable("model_unavailable", "a model file became shorter while it was read")
        into, offset = into[count:], offset + count


# ── matrices ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Linear(Protocol):
    """x: [tokens, in] fp32 -> [tokens, out] fp32, whatever the numbers inside are."""

    nbytes: int

    def __call__(self, x: Tensor) -> Tensor: ...


class Int8Linear:
    """Weights s8 with a scale per row, activations quantized per token on the fly.

    Activations are u8 with the zero point 128 because oneDNN has no fast kernel for s8 x s8, and every token has its own
    scale because one scale for a whole batch triples the error (docs/lab-log.md). Integer sums are exact, so a row's result
    does not depend on which other rows share the batch.
    """

    def __init__(self, weight: Tensor, scales: Tensor) -> None:  # weight [out, in] s8, scales [out] fp32
        self.nbytes = weight.nbytes + scales.nbytes
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales = scales / 127.0
        self._zeros = torch.zeros(scales.shape[0], dtype=torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        # max |x| of each token, [tokens, 1], without a copy of x; aminmax does both in one pass and takes four times as long.
        peak = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_()).clamp_min_(1e-8)
        # Truncation after adding 128.5 is rounding; a separate round() would be one more pass over memory.
        quantized = (x * (127.0 / peak)).add_(128.5).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized, 1.0, 128, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(peak)


class DenseLinear:
    """Weights in bf16 or fp32."""

    def __init__(self, weight: Tensor) -> None:  # [out, in]
        self.nbytes = weight.nbytes
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).float()


def quantize_rows(block: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] -> s8 of the same shape and a scale per row."""
    block = block.float()
    scales = block.abs().amax(-1).clamp_min(1e-8).div_(127.0)
    return block.div_(scales[:, None]).round_().to(torch.int8), scales


class Embedding(Protocol):
    nbytes: int

    def __call__(self, ids: Sequence[int]) -> Tensor: ...  # [tokens, hidden] fp32


class FileEmbedding:
    """Rows read from the model's own file when they are needed.

    The output head needs the same matrix packed for its kernel, which cannot be read by rows; a second copy would cost
    250 MiB of the 1B shape. A row is 4 KiB from the page cache: microseconds, and exact.
    """

    nbytes = 0

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._stored = tensors, tensors[name]

    def __call__(self, ids: Sequence[int]) -> Tensor:
        row, stored = self._stored.row_bytes, self._stored
        buffer = bytearray(len(ids) * row)
        view = memoryview(buffer)
        for i, token in enumerate(ids):
            _read_exactly(stored.file, view[i * row : (i + 1) * row], stored.offset + token * row)
        return torch.frombuffer(buffer, dtype=stored.dtype).view(len(ids), -1).float()


class DenseEmbedding:
    """The output head's own matrix (tied), or one of its own."""

    def __init__(self, weight: Tensor, tied: bool) -> None:
        self._weight, self.nbytes = weight, 0 if tied else weight.nbytes

    def __call__(self, ids: Sequence[int]) -> Tensor:
        return self._weight[torch.tensor(ids)].float()


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layer(msgspec.Struct, frozen=True):
    norm1: Tensor  # [hidden] fp32, as is norm2
    qkv: Linear  # hidden -> (heads + 2 kv_heads) * head_dim
    out: Linear
    norm2: Tensor
    gate_up: Linear  # hidden -> 2 * inner
    down: Linear


class Weights(msgspec.Struct, frozen=True):
    shape: Shape
    kind: Kind
    embed: Embedding
    layers: list[Layer]
    norm: Tensor
    head: Linear
    tensors: Tensors  # the open files

    @property
    def nbytes(self) -> int:
        parts = [p for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return self.embed.nbytes + self.head.nbytes + sum(p.nbytes for p in parts)


def load_weights(folder: Path, kind: Kind, cache: Path | None = None) -> Weights:
    """Read the model in `folder`. With `cache`, int8 matrices are kept there and found again at the next start."""
    shape = read_shape(folder)
    tensors = Tensors.of_folder(folder)
    try:
        if kind == "int8" and cache is not None:
            try:
                with _quantized_cache(cache, tensors, shape) as matrix:
                    return _assemble(shape, kind, tensors, matrix)
            except _CacheBroken as exc:  # its file is gone now: make it again
                log.warning("the cached weights in %s are damaged (%s) and are made again", cache, exc.message)
                with _quantized_cache(cache, tensors, shape) as matrix:
                    return _assemble(shape, kind, tensors, matrix)
        return _assemble(shape, kind, tensors, lambda names: _matrix(tensors, names, kind))
    except BaseException:
        tensors.close()
        raise
    finally:
        trim()


def _assemble(shape: Shape, kind: Kind, tensors: Tensors, matrix: Callable[[Sequence[str]], Linear]) -> Weights:
    embedding = "model.embed_tokens.weight"
    _expect(tensors, embedding, (shape.vocab, shape.hidden))
    # The largest matrix first, while there is nothing else: its packing is the peak of the whole load.
    head = matrix([embedding if shape.tied else "lm_head.weight"])
    layers = []
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        _expect(tensors, p + "self_attn.q_proj.weight", (shape.heads * shape.head_dim, shape.hidden))
        _expect(tensors, p + "self_attn.k_proj.weight", (shape.kv_heads * shape.head_dim, shape.hidden))
        _expect(tensors, p + "mlp.down_proj.weight", (shape.hidden, shape.inner))
        layers.append(
            Layer(
                tensors.rows(p + "input_layernorm.weight").float(),
                matrix([p + f"self_attn.{n}_proj.weight" for n in "qkv"]),
                matrix([p + "self_attn.o_proj.weight"]),
                tensors.rows(p + "post_attention_layernorm.weight").float(),
                matrix([p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"]),
                matrix([p + "mlp.down_proj.weight"]),
            )
        )
    embed: Embedding
    if isinstance(head, DenseLinear):
        weight = head.weight if shape.tied else _dense(tensors, [embedding], head.weight.dtype)
        embed = DenseEmbedding(weight, shape.tied)
    else:
        embed = FileEmbedding(tensors, embedding)
    return Weights(shape, kind, embed, layers, tensors.rows("model.norm.weight").float(), head, tensors)


def _expect(tensors: Tensors, name: str, shape: tuple[int, ...]) -> None:
    if tensors[name].shape != shape:
        raise SettingsError(f"{name} is {tensors[name].shape} in the files and {shape} after config.json")


def _blocks(tensors: Tensors, names: Sequence[str]) -> Iterator[Tensor]:
    for name in names:
        rows, columns = tensors[name].shape
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            yield tensors.rows(name, start, start + step)


def _dense(tensors: Tensors, names: Sequence[str], dtype: torch.dtype) -> Tensor:
    rows = sum(tensors[name].shape[0] for name in names)
    whole = torch.empty(rows, tensors[names[0]].shape[1], dtype=dtype)
    at = 0
    for block in _blocks(tensors, names):
        whole[at : at + len(block)] = block
        at += len(block)
    return whole


def _quantized(tensors: Tensors, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    rows = sum(tensors[name].shape[0] for name in names)
    weight = torch.empty(rows, tensors[names[0]].shape[1], dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    at = 0
    for block in _blocks(tensors, names):
        weight[at : at + len(block)], scales[at : at + len(block)] = quantize_rows(block)
        at += len(block)
    return weight, scales


def _matrix(tensors: Tensors, names: Sequence[str], kind: Kind) -> Linear:
    if kind == "int8":
        return Int8Linear(*_quantized(tensors, names))
    return DenseLinear(_dense(tensors, names, torch.bfloat16 if kind == "bf16" else torch.float32))


@contextlib.contextmanager
def _quantized_cache(cache: Path, tensors: Tensors, shape: Shape) -> Iterator[Callable[[Sequence[str]], Linear]]:
    """Hands out int8 matrices: from the cache file where it is whole and of these very files, else made and written there.

    The file's name is the hash of what it was made from; every matrix carries the hash of its bytes. Anything that does not
    fit is made anew, so the folder may be deleted at any time. A new file appears under its name only when it is complete.
    """
    identity = tensors.identity.copy()
    identity.update(b"hubpeer int8 1" + msgspec.json.encode(msgspec.to_builtins(shape)))
    path = cache / f"{identity.hexdigest()[:32]}.int8"
    if path.is_file():
        try:
            with path.open("rb") as kept:
                yield lambda names: _cached(kept, names)
            return
        except _CacheBroken:
            path.unlink(missing_ok=True)
            raise
    cache.mkdir(parents=True, exist_ok=True)
    for stale in cache.glob("*.int8.new"):
        stale.unlink(missing_ok=True)
    new = path.with_suffix(".int8.new")
    try:
        with new.open("wb") as file:

            def make(names: Sequence[str]) -> Linear:
                weight, scales = _quantized(tensors, names)
                body, tail = weight.numpy().data, scales.numpy().data
                digest = hashlib.sha256(body)
                digest.update(tail)
                file.write(struct.pack("<II32s", *weight.shape, digest.digest()))
                file.write(body)
                file.write(tail)
                return Int8Linear(weight, scales)

            yield make
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


class _CacheBroken(Unavailable):
    pass


def _cached(file: Any, names: Sequence[str]) -> Linear:
    head = file.read(40)
    if len(head) < 40:
        raise _CacheBroken("model_unavailable", f"it ends before {names[0]}")
    rows, columns, wanted = struct.unpack("<II32s", head)
    weight = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    digest = hashlib.sha256()
    for part in (weight, scales):
        view = memoryview(part.numpy().data).cast("B")
        if file.readinto(view) != len(view):
            raise _CacheBroken("model_unavailable", f"it ends inside {names[0]}")
        digest.update(view)
    if digest.digest() != wanted:
        raise _CacheBroken("model_unavailable", f"{names[0]} does not have its hash")
    return Int8Linear(weight, scales)


def few_kernels() -> None:
    """Keep oneDNN from collecting kernels: it compiles one for every shape and keeps 1,024 of them, 0.3 to 0.5 MiB each.

    A hub that has seen many lengths would hold 400 MiB of them. A route of thirty steps asks for some 60 kernels and a document
    for 35, at 0.5 ms where one has to be compiled again. Read by oneDNN at its first product; what the environment says wins.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


#: Free memory at the end of an arena that glibc keeps (M_TRIM_THRESHOLD): what a step frees is for the next step.
KEPT: Final = 128 << 20
_TRIM_THRESHOLD: Final = -1


def keep_pages() -> None:
    """Let the allocator keep what a step frees for the next step.

    By default glibc maps every large block anew and unmaps it when it is freed: a 256-token step of the 1B shape then takes a
    quarter of a million page faults. The model's thread gets an arena that is there: new ones hold no such blocks.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL(None)
        for option, value in ((-3, 32 << 20), (_TRIM_THRESHOLD, KEPT), (-8, 1)):  # M_MMAP_THRESHOLD, M_ARENA_MAX
            libc.mallopt(option, value)


def trim() -> None:
    """Hand memory that the allocator keeps for later back to the system: what loading and jobs left is not needed again.

    `malloc_trim` leaves the free end of every arena but the first one as it is. That of the calling thread's goes when a block
    is freed while the threshold is low.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        libc.malloc_trim(0)
        libc.mallopt(_TRIM_THRESHOLD, 0)
        libc.free(libc.malloc(1 << 17))
        libc.mallopt(_TRIM_THRESHOLD, KEPT)
