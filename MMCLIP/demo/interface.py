"""The page of the demo in Gradio: what is on it, what happens on it, and that no upload stays on disk."""

import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.phantom import make_phantom
from ..inference.reading import MAX_FINDINGS, Film, FilmReader, Finding, known_findings, parse_finding
from . import pages


UPLOAD_SECONDS = 120  # what is older in the folder of uploads was broken off, or never asked about
SESSION_SECONDS = 30 * 60  # the longest that a film stays in memory
OPACITY = 60  # per cent
# what `css` does not reach, the outermost part of the page: narrow margins on telephones, dark scroll bars
OUTERMOST = """<style>
@media (max-width: 600px) { .gradio-container .app { padding: 8px 12px !important; } }
html:has(body.dark) { color-scheme: dark; }
</style>"""
SET_OPACITY = "(value) => { document.documentElement.style.setProperty('--mm-opacity', value / 100); }"


def private_uploads() -> Path:
    """A folder of this process alone for what Gradio writes. It is emptied of old files, and removed at the end.

    To be called before Gradio is imported. `take_upload` removes an upload as soon as it is in memory; here goes what
    never came so far.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    folder = Path(tempfile.mkdtemp(prefix="mmclip-demo-"))  # readable by this user alone
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def keep_empty():
        while folder.exists():
            time.sleep(UPLOAD_SECONDS / 4)
            remove_old(folder, UPLOAD_SECONDS)

    threading.Thread(target=keep_empty, daemon=True).start()
    return folder


def remove_old(folder: Path, seconds: float) -> None:
    """Remove the files below `folder` that nobody has written to for so long, and the folders that this empties."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside comes first
        try:
            if time.time() - path.stat().st_mtime > seconds:
                path.rmdir() if path.is_dir() else path.unlink()
        except OSError:
            continue  # gone already, or not empty


def take_upload(path: str) -> bytes:
    """The content of an uploaded file, which is removed. Raises `ValueError` where it is gone."""
    file = Path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError("the upload is gone. Drop the file once more.") from None
    finally:
        file.unlink(missing_ok=True)
    return content


class Demo:
    """What happens on the page: each method takes what a component holds and returns HTML for others."""

    def __init__(self, reader: FilmReader):
        self.reader = reader

    def upload(self, path: str | None, names: Sequence[str]) -> tuple:
        """An upload -> nothing in the place of the upload, then as `show`."""
        if path is None:
            return None, *self.show(None, names)
        name = Path(path).name
        try:
            film = self.reader.read(take_upload(path), name)
        except (ValueError, ImportError) as error:
            return None, None, "", pages.error_notice(error), "", ""
        return None, *self.show(film, names)

    def example(self, names: Sequence[str]) -> tuple:
        """A radiograph that is drawn, as `show`."""
        index = int(np.random.default_rng().integers(2**31))
        phantom = make_phantom(seed=0, index=index, size=512)
        return self.show(self.reader.read(phantom.image, "a made-up radiograph"), names)

    def show(self, film: Film | None, names: Sequence[str]) -> tuple[Film | None, str, str, str, str]:
        """The film, and the pages of film, scores, heat maps and nearest reports."""
        if film is None:
            return None, "", pages.empty(), "", ""
        reports = pages.reports_page(self.reader.nearest_reports(film))
        return film, pages.film_page(film), *self.ask(film, names), reports

    def ask(self, film: Film | None, names: Sequence[str]) -> tuple[str, str]:
        """The pages of scores and heat maps for findings as they were chosen or typed; the film is not read again."""
        if film is None:
            return pages.empty(), ""
        findings, refused = self.findings(names)
        scores = self.reader.score(film, findings)
        notices = "".join(pages.error_notice(reason) for reason in refused)
        maps = pages.maps_page(film, scores, self.reader.heatmaps(film, findings))
        return pages.doubt_notice(film) + notices + pages.scores_page(scores, self.reader.calibration), maps

    def findings(self, names: Sequence[str]) -> tuple[list[Finding], list[str]]:
        """The findings that can be asked, each once, and what is wrong with the others."""
        findings, refused = {}, []
        for name in names or ():
            try:
                finding = parse_finding(name, self.reader.prompts)
            except ValueError as error:
                refused.append(str(error))
                continue
            findings.setdefault(finding.name, finding)
        if len(findings) > MAX_FINDINGS:
            refused.append(f"{len(findings)} findings are too many: the first {MAX_FINDINGS} are shown.")
        return list(findings.values())[:MAX_FINDINGS], refused


def build_page(reader: FilmReader, about: str):
    """The `gradio.Blocks` of the demo, to be started by `launch`. `about` says in HTML which model answers."""
    import gradio as gr

    demo = Demo(reader)
    with gr.Blocks(title="MMCLIP demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>MMCLIP: a chest X-ray and sentences about it</h1>{pages.notice(pages.WARNING, 'warning')}")
        film = gr.State(None, time_to_live=SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_classes="mm-left"):
                upload = gr.File(label="X-ray: PNG, JPEG, TIFF, DICOM", elem_id="mm-upload", height=180)
                example = gr.Button("Try a made-up radiograph", elem_id="mm-example", size="sm")
                names = gr.Dropdown(
                    known_findings(reader.prompts),
                    value=reader.suggestions(),
                    label="Findings",
                    info="Choose from the vocabulary, or type a phrase and press Enter.",
                    multiselect=True,
                    allow_custom_value=True,
                    max_choices=MAX_FINDINGS,
                    elem_id="mm-findings",
                )
                film_page = gr.HTML(elem_id="mm-film")
            with gr.Column(scale=3, min_width=300):
                scores = gr.HTML(pages.empty(), elem_id="mm-scores")
                with gr.Column(elem_classes="mm-heat-block"):
                    gr.HTML("<h3>Heat maps</h3>")
                    opacity = gr.Slider(0, 100, OPACITY, step=1, label="Opacity, %", elem_id="mm-opacity")
                    maps = gr.HTML(elem_id="mm-maps")
                reports = gr.HTML(elem_id="mm-reports")
        gr.HTML(f'<p class="mm-hint">{about}</p>')

        everything = [film, film_page, scores, maps, reports]
        # one queue: the model answers one question at a time, whoever asks
        shared = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        shared |= {"show_progress": "minimal"}
        upload.upload(demo.upload, [upload, names], [upload, *everything], **shared)
        example.click(demo.example, [names], everything, **shared)
        names.change(demo.ask, [film, names], [scores, maps], trigger_mode="always_last", **shared)
        page.unload(_forgetting(page))
        opacity.input(None, [opacity], None, js=SET_OPACITY, show_progress="hidden")  # in the browser alone
    return page


def _forgetting(page):
    """What removes the film of a page that is closed; Gradio alone would hold it for an hour more."""
    import gradio as gr

    def forget(request: gr.Request) -> None:
        page.state_holder.delete_state(request.session_hash)

    return forget


def launch(page, *, max_upload_mb: int, host: str | None = None, port: int | None = None) -> str:
    """Serve the page from a thread and return its address.

    At `host` and `port`, else at GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, else for this machine alone. Nothing of
    Gradio's that keeps or sends anything is on.
    """
    import gradio as gr

    # fonts of the machine, and quiet text with a contrast above 4.5
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    page.queue(max_size=32)
    _, local_url, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{max_upload_mb}mb",
        state_session_capacity=64,
        share=False,
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
        css=pages.STYLE,
        head=OUTERMOST,
        theme=theme,
        prevent_thread_lock=True,
    )
    return local_url
