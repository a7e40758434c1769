"""Where models come from, as people write it: parse and format are inverse."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from typing_extensions import override

from edge.errors import InvalidReference

from .digest import Digest
from .manifest import REPOSITORY, TAG

FORMS = (
    "hf://OWNER/REPO[/FILE.gguf][@REVISION], oci://HOST[:PORT]/NAME[:TAG][@sha256:DIGEST], "
    "pypi://PACKAGE==VERSION[/PATH/INSIDE.gguf], https://HOST/FILE.gguf, a file's path, or a name of the catalog"
)
_HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,63}")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_MAX_SOURCE = 2048


@dataclass(frozen=True, slots=True)
class HubSource:
    """A file of a repository on a Hugging Face hub; without `file`, its only GGUF."""

    repo: str
    file: str = ""
    revision: str = "main"

    @override
    def __str__(self) -> str:
        path = f"{self.repo}/{self.file}" if self.file else self.repo
        return f"hf://{path}" if self.revision == "main" else f"hf://{path}@{self.revision}"


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """An artifact of an OCI registry. With a digest the tag only names it; without either it is ``latest``."""

    host: str
    """With its port, where it has one."""
    repository: str
    tag: str = ""
    digest: Digest | None = None

    @property
    def reference(self) -> str:
        """What the registry is asked for."""
        return self.digest or self.tag or "latest"

    @override
    def __str__(self) -> str:
        tag, digest = self.tag and f":{self.tag}", self.digest and f"@{self.digest}"
        return f"oci://{self.host}/{self.repository}{tag}{digest or ''}"


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A file inside a wheel of a Python package index; without `member`, its only GGUF."""

    package: str
    version: str
    member: str = ""

    @override
    def __str__(self) -> str:
        head = f"pypi://{self.package}=={self.version}"
        return f"{head}/{self.member}" if self.member else head


@dataclass(frozen=True, slots=True)
class HttpSource:
    """A file on a web server."""

    url: str

    @override
    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file on this machine."""

    path: Path

    @override
    def __str__(self) -> str:
        return str(self.path)


Source = HubSource | RegistrySource | PackageSource | HttpSource | FileSource


def parse_source(text: str) -> Source:
    """Read a source; catalog names are not its business.

    Raises:
        InvalidReference: It is none of the forms.
    """
    if len(text) > _MAX_SOURCE or not text.isprintable():
        raise InvalidReference("The source is too long or holds control characters.", hint=f"Sources: {FORMS}.")
    scheme, separator, rest = text.partition("://")
    match scheme.lower() if separator else "":
        case "hf":
            return _parse_hub(text, rest)
        case "oci":
            return _parse_registry(text, rest)
        case "pypi":
            return _parse_package(text, rest)
        case "http" | "https":
            return _parse_url(text)
        case "file":
            return FileSource(Path(unquote(rest)))
        case "":
            return FileSource(Path(text).expanduser())
        case _:
            raise _refused(text, f"there is no source '{scheme}://'")


def without_query(source: str) -> str:
    """A source as others may read it, in manifests, logs and errors: a URL's query often holds a signature."""
    return source.partition("#")[0].partition("?")[0] if "://" in source else source


def _refused(text: str, reason: str) -> InvalidReference:
    shown = without_query(text)[:120]
    return InvalidReference(f"The source {shown!r} is refused: {reason}.", hint=f"Sources: {FORMS}.")


def _parse_hub(text: str, rest: str) -> HubSource:
    path, at, revision = rest.partition("@")
    owner, _, tail = path.partition("/")
    repo, _, file = tail.partition("/")
    if not _HUB_NAME.fullmatch(owner) or not _HUB_NAME.fullmatch(repo):
        raise _refused(text, "it does not name OWNER/REPO")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise _refused(text, "the revision after @ is not a branch, tag or commit")
    if file and not is_safe_path(file):
        raise _refused(text, "the file's path is not allowed")
    return HubSource(f"{owner}/{repo}", file, revision or "main")


def _parse_registry(text: str, rest: str) -> RegistrySource:
    path, at, digest = rest.partition("@")
    host, _, named = path.partition("/")
    repository, colon, tag = named.partition(":")
    if not _HOST.fullmatch(host):
        raise _refused(text, "it does not name HOST or HOST:PORT")
    if len(repository) > 255 or not REPOSITORY.fullmatch(repository):
        raise _refused(text, "the name after the host is not one: lower-case letters, digits and . _ - / between them")
    if colon and not TAG.fullmatch(tag):
        raise _refused(text, "the tag after : is not one")
    try:
        return RegistrySource(host.lower(), repository, tag, Digest(digest) if at else None)
    except InvalidReference as e:
        raise _refused(text, "what stands after @ is not sha256: and 64 hex digits") from e


def _parse_package(text: str, rest: str) -> PackageSource:
    package, equals, tail = rest.partition("==")
    version, _, member = tail.partition("/")
    if not _PACKAGE.fullmatch(package) or not equals or not _VERSION.fullmatch(version):
        raise _refused(text, "it does not name PACKAGE==VERSION")
    if member and not is_safe_path(member):
        raise _refused(text, "the path inside the package is not allowed")
    return PackageSource(package, version, member)


def _parse_url(text: str) -> HttpSource:
    try:
        parts = urlsplit(text)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as e:
        raise _refused(text, "it is not a URL") from e
    if not has_host:
        raise _refused(text, "it names no host")
    if parts.username or parts.password:
        raise _refused(f"{parts.scheme}://…@{parts.hostname}", "a password in a URL ends up in logs")
    return HttpSource(text)


def is_safe_path(path: str) -> bool:
    """Whether a path inside a repository or package stays there, and survives being written into a source."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and path.isprintable() and not set(path) & set("\\@")


def file_name_of(source: Source) -> str:
    """The name of the file that a source ends in; for people, and to derive a model's name from."""
    match source:
        case HubSource(repo=repo, file=file):
            return PurePosixPath(file or repo).name
        case RegistrySource(repository=repository):
            return PurePosixPath(repository).name
        case PackageSource(package=package, member=member):
            return PurePosixPath(member or package).name
        case HttpSource(url=url):
            return PurePosixPath(unquote(urlsplit(url).path)).name or "model"
        case FileSource(path=path):
            return path.name
