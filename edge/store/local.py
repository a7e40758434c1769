"""Files and checkpoint directories of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge.errors import DigestMismatch, SourceUnavailable

from .blobs import BlobStore, Partial, Staged
from .checkpoints import Converter, convert_in, is_checkpoint
from .transfer import CHECK_EVERY_BYTES, Control, Offer, require_room


@dataclass(frozen=True, slots=True)
class FileFetcher:
    """A file that is copied in, or a checkpoint directory that is converted."""

    path: Path
    converter: Converter | None = None

    def look(self, control: Control) -> Offer:
        """Look at the file's size.

        Raises:
            SourceUnavailable: It is not there, or neither a file nor a checkpoint.
        """
        control.check()
        path = self.path.absolute()
        if is_checkpoint(path):
            return Offer(str(path), f"{path.name}.gguf")
        if not path.is_file():
            reason = "is a directory" if path.is_dir() else "does not exist"
            raise SourceUnavailable(
                f"{path} {reason}.", hint="A model is one GGUF file, or a directory with config.json."
            )
        return Offer(str(path), path.name, path.stat().st_size)

    def fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        """Copy the file, or convert the directory."""
        if is_checkpoint(self.path):
            return convert_in(self.path.absolute(), self.converter, blobs, partial, control)
        require_room(blobs, (offer.size_bytes or 0) - partial.size_bytes, partial)
        staged = self._copy(offer, blobs, partial, control)
        if offer.digest and staged.digest != offer.digest:
            raise DigestMismatch(offer.source, expected=offer.digest, actual=staged.digest)
        return staged

    def _copy(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        checked_bytes = 0

        def before_chunk() -> None:
            nonlocal checked_bytes
            if partial.size_bytes >= checked_bytes:  # files under /proc give more than the size that they tell
                left = (offer.size_bytes or 0) - partial.size_bytes
                require_room(blobs, left if left > 0 else CHECK_EVERY_BYTES, partial)
                checked_bytes = partial.size_bytes + CHECK_EVERY_BYTES
            control.report(partial.size_bytes, offer.size_bytes, f"copying {offer.file_name}")

        return blobs.copy_in(self.path, partial, before_chunk=before_chunk)
