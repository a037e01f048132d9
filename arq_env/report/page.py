"""One HTML file, and PNGs, that show what is in run folders.

The file holds everything it needs, Vega's drawing code among it, and forbids its own reader to fetch anything.
"""

from collections.abc import Sequence
from pathlib import Path

from arq_env.report.run import Run
from arq_env.report.section import Datasets
from arq_env.support.errors import ArqError
from arq_env.support.files import atomic_file
from arq_env.support.provenance import provenance

#: Width of the PNGs' drawing area, in pixels; pixels of the file for each of them; and the colour of text.
WIDTH, SCALE, PNG_INK = 760, 2, "#1c1c1c"


def write_report(runs: Sequence[Run], folder: Path, datasets: Datasets) -> Path:
    """Write ``report.html`` and its charts as PNGs; return the HTML file's path.

    :param runs: one is shown in full; several are compared
    :param folder: for the files; what an earlier report left there is written over
    :param datasets: where the pictures of test images come from
    :raises ArqError: when the plotting library is not installed, or nothing can be written
    """
    altair, vl_convert = _plotting()
    from arq_env.report import compared, single
    from arq_env.report.figures import INK, themed

    runs = compared.named(runs) if len(runs) > 1 else runs
    sections = single.sections(runs[0], datasets) if len(runs) == 1 else compared.sections(runs)
    title, under = single.title(runs[0]) if len(runs) == 1 else compared.title(runs)
    specs = []
    for section in sections:
        if section.charts:
            document = themed(altair.vconcat(*(chart.properties(width=WIDTH) for chart in section.charts)), PNG_INK, section.title)
            with atomic_file(folder / f"{section.file}.png") as file:
                file.write(vl_convert.vegalite_to_png(document, scale=SCALE))
        specs.append([themed(chart.properties(width="container"), INK) for chart in section.charts])
    page = _template().render(
        title=title,
        under=under,
        sections=list(zip(sections, specs, strict=True)),
        notes=[note for run in runs for note in run.notes],
        command=runs[0].config.get("provenance", {}).get("command") if len(runs) == 1 else None,
        made=provenance(),
        drawing=vl_convert.javascript_bundle(vl_version=".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])),
    )
    with atomic_file(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def _plotting():
    """Altair, and what draws its charts without a browser.

    :raises ArqError: where they are not installed
    """
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise ArqError(f'a report is drawn with Vega-Altair, which is not here ({error}): pip install -e ".[report]"') from error
    return altair, vl_convert


def _template():
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the charts' own order
    environment.filters["script"] = lambda code: code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return environment.get_template("page.html.j2")
