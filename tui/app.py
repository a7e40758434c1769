"""The operator's terminal: one connection, four screens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from textual.app import App, SystemCommand
from textual.binding import BindingType
from textual.reactive import reactive
from textual.screen import Screen
from textual.theme import BUILTIN_THEMES, Theme
from textual.timer import Timer
from typing_extensions import override

from edge.errors import EdgeError
from runtime.api.schema import DeviceStatus, Job

from .actions import ACTIONS, Action, bindings_for, key_text
from .client import RuntimeClient
from .css import beside
from .feed import Backoff, follow
from .format import clean_line
from .messages import (
    CancelRequested,
    DeleteRequested,
    FlushRequested,
    LoadRequested,
    PullRequested,
    TalkRequested,
    UnloadRequested,
)
from .screens.base import EdgeScreen
from .screens.chat import ChatScreen
from .screens.help import HelpScreen
from .screens.logs import LogsScreen
from .screens.models import ModelsScreen
from .screens.overview import OverviewScreen
from .state import STALE_AFTER_S, View, finished_jobs, fold_error, fold_job, fold_status, fold_time

EDGE_DARK = Theme(
    name="edge-dark",
    primary="#4aa3c7",
    secondary="#7f8fa6",
    accent="#5fc9b2",
    success="#6cc070",
    warning="#e0b04a",
    error="#e5695e",
    foreground="#d7dde5",
    background="#101418",
    surface="#161b21",
    panel="#1d242c",
    variables={"border-blurred": "#3a4653", "text-muted": "#8d99a8"},
)
# For 16 colours: the terminal's own, so that they fit whatever it is set to.
EDGE_16 = replace(
    BUILTIN_THEMES["ansi-dark"],
    name="edge-16",
    variables={**BUILTIN_THEMES["ansi-dark"].variables, "border-blurred": "ansi_bright_black"},
)
TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Timing:
    """The clock and the waits, so that tests can hold them."""

    clock: Callable[[], float] = time.monotonic
    stale_after_s: float = STALE_AFTER_S + 0.1
    """When to look whether the figures are stale: a little after they are."""
    backoff: Backoff = field(default_factory=Backoff)


class EdgeTerminal(App[None]):
    """Owns the connection and the view; does what screens ask for.

    The client is used while the app runs and closed when it ends.
    """

    CSS = beside(__file__)
    TITLE = "edge"
    BINDINGS: ClassVar[list[BindingType]] = [*bindings_for("everywhere")]
    COMMAND_PALETTE_BINDING = "ctrl+p"
    NOTIFICATION_TIMEOUT = 3
    view: reactive[View] = reactive(View())

    def __init__(
        self,
        client: RuntimeClient,
        *,
        read_only: bool = False,
        theme: Literal["edge-dark", "edge-16"] = "edge-dark",
        timing: Timing | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._timing = timing or Timing()
        self._wake = asyncio.Event()
        self._tick_timer: Timer | None = None
        # A slow line draws no frames between two states.
        self.animation_level = "none"
        self.register_theme(EDGE_DARK)
        self.register_theme(EDGE_16)
        self.theme = theme
        self.view = View(address=str(client.address), read_only=read_only, now=self._timing.clock())

    def on_mount(self) -> None:
        screens: dict[str, Callable[[], EdgeScreen]] = {
            "overview": OverviewScreen,
            "models": ModelsScreen,
            "chat": lambda: ChatScreen(self._client, clock=self._timing.clock),
            "logs": lambda: LogsScreen(self._client),
        }
        for name, make in screens.items():
            self.add_mode(name, lambda make=make: make().data_bind(EdgeTerminal.view))  # pyright: ignore[reportUnknownMemberType]  # Textual's Screen stands there without its parameter
        self.switch_mode("overview")
        self.run_worker(self._follow(), name="feed")

    async def on_unmount(self) -> None:
        await self._client.close()

    async def _follow(self) -> None:
        async for event in follow(self._client, wake=self._wake, backoff=self._timing.backoff):
            now = self._timing.clock()
            if isinstance(event, DeviceStatus):
                self.view = fold_status(self.view, event, now)
                self._tick_after(self._timing.stale_after_s)
            elif isinstance(event, Job):
                self.view = fold_job(self.view, event)
            elif isinstance(event, EdgeError):
                self.view = fold_error(self.view, event, now)

    def _tick_after(self, seconds: float) -> None:
        """Look at the clock again after a while: figures grow old although nothing comes."""
        if self._tick_timer is not None:
            self._tick_timer.stop()
        self._tick_timer = self.set_timer(seconds, self._tick)

    def _tick(self) -> None:
        self.view = fold_time(self.view, self._timing.clock())
        self._tick_after(TICK_S)

    def watch_view(self, before: View, after: View) -> None:
        """Tell what ended."""
        for job in finished_jobs(before, after):
            self._tell_finished(job)

    def _tell_finished(self, job: Job) -> None:
        if job.state == "done":
            self.notify(job.message or job.subject, title=f"{job.kind}: done", markup=False)
        elif job.state == "failed":
            self.notify(job.error or job.subject, title=f"{job.kind}: failed", severity="error", markup=False)

    def show_error(self, error: EdgeError) -> None:
        """Tell what went wrong and what to do."""
        self.notify(
            clean_line(error.hint or ""), title=clean_line(error.message), severity="error", timeout=10, markup=False
        )

    def _do(self, call: Awaitable[object], *, done: str | None) -> None:
        """Make one call to the appliance beside everything else, and tell how it ended."""

        async def run() -> None:
            try:
                await call
            except EdgeError as e:
                self.show_error(e)
            else:
                if done:
                    self.notify(done, markup=False)

        self.run_worker(run(), group="calls")

    def on_load_requested(self, message: LoadRequested) -> None:
        self._do(self._client.load(message.ref), done=f"{message.ref} is ready.")

    def on_unload_requested(self, message: UnloadRequested) -> None:
        self._do(self._client.unload(message.ref), done=f"{message.ref} is unloaded.")

    def on_delete_requested(self, message: DeleteRequested) -> None:
        self._do(self._client.delete(message.ref), done=f"{message.ref} is deleted.")

    def on_pull_requested(self, message: PullRequested) -> None:
        # The list of pulls shows that it has begun.
        self._do(self._client.pull(message.source, name=message.name), done=None)

    def on_cancel_requested(self, message: CancelRequested) -> None:
        self._do(self._client.cancel_job(message.job_id), done="The pull is cancelled.")

    def on_flush_requested(self, _message: FlushRequested) -> None:
        self._do(self._client.flush(), done="The spool was flushed.")

    async def on_talk_requested(self, message: TalkRequested) -> None:
        await self.switch_mode("chat")
        if isinstance(self.screen, ChatScreen):
            self.screen.talk_with(message.ref)

    def action_reconnect(self) -> None:
        """Do not wait for the next try."""
        self._wake.set()

    def action_help(self) -> None:
        """Show every key."""
        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen(self.screen.WHERE if isinstance(self.screen, EdgeScreen) else "everywhere"))

    @override
    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        where = screen.WHERE if isinstance(screen, EdgeScreen) else "everywhere"
        for action in ACTIONS:
            if action.id in ("palette", "send") or (self.view.read_only and action.changes):
                continue
            if action.where in ("everywhere", where):
                yield SystemCommand(action.label, action.what, lambda run=action.action: screen.run_action(run))
            else:
                title = f"{action.label} ({action.where})"
                yield SystemCommand(title, action.what, lambda chosen=action: self._run_elsewhere(chosen))
        yield SystemCommand("Theme", "Change the colours", self.action_change_theme)

    async def _run_elsewhere(self, action: Action) -> None:
        await self.switch_mode(action.where)
        if action.of_selection:
            self.notify(f"Choose one, then {key_text(action)}: {action.label}.")
        else:
            await self.screen.run_action(action.action)
