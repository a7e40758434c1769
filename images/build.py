"""How an image is built: which commands of buildah run, in which order, and how large the result is.

Commands are made by pure functions; :class:`Builder` runs them.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge import __version__
from edge.errors import RecipeError, ToolMissing

from .hostconfig import COMMON, MOUNT, Mount, write_inputs
from .target import Target

DEBIAN = "debian"
"""As a base: made from Debian packages. Any other word is the name of an image; None tries the target's, then this."""
_LOCAL_BASE = "localhost/slm-edge-base"
_PACKAGES = {"buildah": "buildah", "mmdebstrap": "mmdebstrap", "apt-get": "apt"}
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9._:/@-]{0,254}")
_PULL_TIMEOUT_S = 1800.0
_BUILDAH_TIMEOUT_S = 900.0
_KEPT_LINES = 30

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Storage:
    """Where buildah keeps images; with no root, where it does so for this user anyway."""

    root: Path | None = None

    @property
    def options(self) -> tuple[str, ...]:
        if self.root is None:
            return ()
        return ("--root", f"{self.root / 'storage'}", "--runroot", f"{self.root / 'run'}", "--storage-driver=overlay")


@dataclass(frozen=True, slots=True)
class Base:
    """The image that both stages start from; `suite` where it has no apt sources of its own."""

    image: str
    suite: str | None


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What was built. Sizes in bytes, times in seconds; sizes are those of the image without a model."""

    target: str
    image: str
    image_id: str
    base: str
    size_bytes: int
    compressed_bytes: int
    num_layers: int
    model: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """One image of this project in the storage; `created` in Unix time."""

    image: str
    image_id: str
    size_bytes: int
    created: int


class _Layer(msgspec.Struct):
    size: int
    digest: str = ""


class _Manifest(msgspec.Struct):
    layers: list[_Layer]


class _Inspected(msgspec.Struct):
    image_id: str = msgspec.field(name="FromImageID")
    manifest: str = msgspec.field(name="Manifest")


class _Listed(msgspec.Struct):
    id: str
    created: int
    names: list[str] | None = None


class _Index(msgspec.Struct):
    manifests: list[_Layer]


def require_tool(name: str) -> None:
    """Check that a program is there.

    Raises:
        ToolMissing: It is not; the hint names the Debian packages.
    """
    if shutil.which(name) is None:
        raise ToolMissing(
            f"Building an image needs the program '{name}', which is not installed.",
            hint=f"On Debian: apt-get install {_PACKAGES.get(name, name)} (docs/targets.md lists all that is used).",
        )


def project_root(context: Path | None = None) -> Path:
    """The checkout that images are built from.

    Raises:
        RecipeError: `context`, or the place this package was loaded from, is no checkout.
    """
    root = (context or Path(__file__).parent.parent).absolute()
    if not (root / "pyproject.toml").is_file() or not (root / "images" / "locks" / "core.txt").is_file():
        raise RecipeError(
            f"An image is built from a checkout of slm-edge, and {root} is none.",
            hint="Run the command in a checkout's environment, or name one with --context DIR.",
        )
    return root


def check_image_name(name: str, *, what: str) -> str:
    """`name`, once it is one that buildah takes for an image and not for an option.

    Raises:
        RecipeError: It is not.
    """
    if not _IMAGE.fullmatch(name):
        raise RecipeError(f"{what}: {name[:80]!r} is not the name of an image.", hint="For example localhost/slm:1.")
    return name


def debian_base_name(target: Target) -> str:
    """The name of the base made from Debian packages: another script, another name."""
    digest = hashlib.sha256((COMMON / "base.sh").read_bytes()).hexdigest()[:12]
    return f"{_LOCAL_BASE}:{target.suite}-{target.architecture}-{digest}"


def base_command(storage: Storage, target: Target) -> list[str]:
    """Make the base from Debian packages."""
    script = str(COMMON / "base.sh")
    return [script, target.suite, target.architecture, debian_base_name(target), *storage.options]


def build_command(
    storage: Storage,
    name: str,
    target: Target,
    *,
    base: str,
    tag: str,
    context: Path,
    mounts: Sequence[Mount],
    revision: str | None = None,
    no_cache: bool = False,
) -> list[str]:
    """Build a target's Containerfile. The format is Docker's, because OCI's has no health check."""
    labels = {"org.opencontainers.image.version": __version__, "dev.slm-edge.target": name}
    if revision:
        labels["org.opencontainers.image.revision"] = revision
    return [
        "buildah",
        *storage.options,
        "bud",
        *("--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker"),
        *("--arch", target.architecture),
        "--no-cache" if no_cache else "--layers",
        *_pairs("--build-arg", {"BASE": base, "CMAKE_ARGS": " ".join(target.cmake_args)}),
        *_pairs("--label", labels),
        *(part for mount in mounts for part in ("--volume", mount.argument)),
        *("--file", str(context / target.containerfile), "--tag", tag, str(context)),
    ]


def bake_command(storage: Storage, *, image: str, tag: str, seed: Path, model: str) -> list[str]:
    """Put a model into a finished image, as the seed from which an empty store is filled."""
    return [
        "buildah",
        *storage.options,
        "bud",
        *("--isolation", "chroot", "--pull-never", "--format", "docker", "--no-cache"),
        *_pairs("--build-arg", {"IMAGE": image}),
        *_pairs("--label", {"dev.slm-edge.model": model}),
        *("--file", str(COMMON / "model.Containerfile"), "--tag", tag, str(seed)),
    ]


def _pairs(option: str, values: Mapping[str, str]) -> Iterator[str]:
    for key, value in values.items():
        yield from (option, f"{key}={value}")


def read_revision(context: Path) -> str | None:
    """The commit of a checkout, ``-dirty`` where it was changed since; None where git cannot tell."""
    git = ["git", "-C", str(context), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


class Builder:
    """Runs the commands, says how far they are, and keeps the time of each.

    Args:
        say: Gets one line of progress at a time.
        verbose: Pass on every line of the tools, not only buildah's steps.
    """

    def __init__(self, storage: Storage, *, say: Say, verbose: bool = False) -> None:
        self._storage = storage
        self._say = say
        self._verbose = verbose
        self.seconds: dict[str, float] = {}

    def is_available(self) -> bool:
        """Whether images can be looked at here: buildah is installed."""
        return shutil.which("buildah") is not None

    def plan(
        self,
        name: str,
        target: Target,
        *,
        base: str | None,
        tag: str,
        context: Path,
        model: str | None = None,
        baked: str | None = None,
    ) -> list[list[str]]:
        """The commands of a build, in order. What a build makes for itself stands as INPUTS and SEED."""
        image = debian_base_name(target) if base == DEBIAN else check_image_name(base or target.base, what="--base")
        commands: list[list[str]] = []
        if not (self.is_available() and self.has_image(image)):
            pull = ["buildah", *self._storage.options, "pull", "--quiet", image]
            commands.append(base_command(self._storage, target) if base == DEBIAN else pull)
        mounts = [Mount(Path("INPUTS"), MOUNT)]
        commands.append(build_command(self._storage, name, target, base=image, tag=tag, context=context, mounts=mounts))
        if baked and model:
            commands.append(bake_command(self._storage, image=tag, tag=baked, seed=Path("SEED"), model=model))
        return commands

    def choose_base(self, target: Target, asked: str | None, *, fresh: bool = False) -> Base:
        """The base to build on: the image asked for, else the target's, else one made from Debian packages.

        Raises:
            RecipeError: An image asked for by name is neither here nor in a registry in reach.
        """
        if asked != DEBIAN:
            image = check_image_name(asked or target.base, what="--base")
            if self.has_image(image) or self._pull(image):
                return Base(image, target.suite if image.startswith(_LOCAL_BASE) else None)
            if asked:
                raise RecipeError(
                    f"The base image {image} cannot be pulled.", hint="Without a registry: --base debian."
                )
            self._say(f"{image} is out of reach; making the base from Debian packages")
        return self._debian_base(target, fresh=fresh)

    def _debian_base(self, target: Target, *, fresh: bool) -> Base:
        name = debian_base_name(target)
        if fresh or not self.has_image(name):
            require_tool("mmdebstrap")
            require_tool("apt-get")
            self.run("base", base_command(self._storage, target))
        return Base(name, target.suite)

    def build(
        self, name: str, target: Target, *, base: Base, tag: str, context: Path, no_cache: bool = False
    ) -> BuildResult:
        """Build a target, measure it and hold it against its size budget.

        Raises:
            RecipeError: A step failed, or the image is larger than its target allows.
        """
        with tempfile.TemporaryDirectory(prefix="slm-edge-build-") as inputs:
            mounts = write_inputs(Path(inputs), debian_suite=base.suite)
            command = build_command(
                self._storage,
                name,
                target,
                base=base.image,
                tag=tag,
                context=context,
                mounts=mounts,
                revision=read_revision(context),
                no_cache=no_cache,
            )
            self.run("build", command)
        result = self._measure(name, tag, base.image)
        limit = target.max_compressed_mb * 1_000_000
        if result.compressed_bytes > limit:
            raise RecipeError(
                f"{tag} is {result.compressed_bytes / 1e6:.1f} MB compressed; {name} allows {limit / 1e6:.0f} MB.",
                hint="Find what grew, or raise max_compressed_mb in images/targets.toml.",
            )
        return result

    def bake(self, *, image: str, tag: str, seed: Path, model: str) -> str:
        """Make an image with a model in it; its id."""
        self.run("model", bake_command(self._storage, image=image, tag=tag, seed=seed, model=model))
        return self._inspect(tag)[0]

    def has_image(self, image: str) -> bool:
        """Whether the image is in the storage."""
        return self._buildah("inspect", "--type", "image", image, check=False).returncode == 0

    def run(self, step: str, command: Sequence[str]) -> None:
        """Run one step.

        Raises:
            RecipeError: It failed; the last lines of what it said stand in the message.
        """
        require_tool(command[0])
        kept: deque[str] = deque(maxlen=_KEPT_LINES)
        with self._timed(step), subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            for raw in process.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                kept.append(line)
                if self._verbose or re.match(r"(\[\d+/\d+\] )?STEP \d+/\d+", line):
                    self._say(line[:400])
        if process.returncode:
            said = "\n".join(line[:400] for line in kept)
            raise RecipeError(
                f"Step '{step}' failed with exit code {process.returncode}. It last said:\n{said}\n",
                hint="Run the command again with --verbose for all of it.",
            )

    def _pull(self, image: str) -> bool:
        with self._timed("pull"):
            return self._buildah("pull", "--quiet", image, check=False, timeout_s=_PULL_TIMEOUT_S).returncode == 0

    def _measure(self, name: str, tag: str, base: str) -> BuildResult:
        with self._timed("measure"), tempfile.TemporaryDirectory(prefix="slm-edge-size-") as directory:
            layout = Path(directory) / "layout"
            self._buildah("push", "--quiet", tag, f"oci:{layout}:image")
            compressed = read_layer_sizes(layout)
        image_id, unpacked = self._inspect(tag)
        return BuildResult(
            target=name,
            image=tag,
            image_id=image_id,
            base=base,
            size_bytes=unpacked,
            compressed_bytes=sum(compressed),
            num_layers=len(compressed),
            seconds=self.seconds,
        )

    def list_images(self) -> list[BuiltImage]:
        """The images of this project in the storage, newest first."""
        listing = self._buildah("images", "--json", "--filter", "label=dev.slm-edge.target").stdout
        found = [
            BuiltImage(image=name, image_id=image_id, size_bytes=size_bytes, created=entry.created)
            for entry in msgspec.json.decode(listing or b"[]", type=list[_Listed] | None) or ()
            for name in entry.names or ()
            for image_id, size_bytes in (self._inspect(name),)
        ]
        return sorted(found, key=lambda image: -image.created)

    def _inspect(self, image: str) -> tuple[str, int]:
        """Id of an image, and the bytes of its layers, unpacked."""
        done = self._buildah("inspect", "--type", "image", image)
        inspected = msgspec.json.decode(done.stdout, type=_Inspected)
        manifest = msgspec.json.decode(inspected.manifest, type=_Manifest)
        return inspected.image_id, sum(layer.size for layer in manifest.layers)

    def _buildah(
        self, *arguments: str, check: bool = True, timeout_s: float = _BUILDAH_TIMEOUT_S
    ) -> subprocess.CompletedProcess[bytes]:
        require_tool("buildah")
        command = ["buildah", *self._storage.options, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as e:
            raise RecipeError(f"buildah {arguments[0]} took longer than {timeout_s:.0f} s.") from e
        if check and done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-800:]
            raise RecipeError(f"buildah {arguments[0]} failed with exit code {done.returncode}: {said}")
        return done

    @contextmanager
    def _timed(self, step: str) -> Generator[None]:
        self._say(f"{step} ...")
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 1)
        self._say(f"{step} took {self.seconds[step]:.1f} s")


def read_layer_sizes(layout: Path) -> list[int]:
    """Sizes of the layers of the one image in an OCI layout, as they lie there."""
    index = msgspec.json.decode((layout / "index.json").read_bytes(), type=_Index)
    algorithm, _, digest = index.manifests[0].digest.partition(":")
    manifest = msgspec.json.decode((layout / "blobs" / algorithm / digest).read_bytes(), type=_Manifest)
    return [layer.size for layer in manifest.layers]
