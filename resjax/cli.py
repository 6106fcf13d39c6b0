"""The `resjax` command: reads what was typed, calls the room that does it, prints what came of it.

Rooms are imported by the command that needs them, so that help, tables and a refused mistake answer
at once. A mistake of the user's is one line and exit code 2; a fault of ours keeps its traceback.
"""

import argparse
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from resjax import __version__
from resjax.config import Config, default_config, load, override, resolve
from resjax.errors import UserError
from resjax.models.presets import PRESETS, architecture, nearest
from resjax.train.signals import Stopped, stop_on_signals

if TYPE_CHECKING:
    import pandas as pd

    from resjax.data.prepared import Prepared
    from resjax.transfer.importing import Options
    from resjax.transfer.weights import Weights


REMOTE = ("hub:", "https:", "http:")  # sources of weights that are no paths


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    try:
        rest, overrides = _split_overrides(typed)
        arguments, unknown = _parser().parse_known_args(rest)
        if unknown:
            options = [f"--{name}" for name in vars(arguments)]
            option = unknown[0].partition("=")[0]
            raise UserError(f"unknown option or argument {option}{nearest(option, options)}")
        if overrides and "config" not in arguments:
            raise UserError(
                f"`resjax {arguments.command}` takes no --config.{next(iter(overrides))}"
            )
        arguments.overrides = overrides
        arguments.typed = shlex.join(["resjax", *typed])
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"resjax: error: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"resjax: {error}; the same command goes on from here", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("resjax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `| head` has read enough; at exit Python would flush into the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _train(arguments: argparse.Namespace) -> int:
    config = resolve(override(load(arguments.config), arguments.overrides))
    from resjax.train import distributed

    cluster = distributed.Cluster(arguments.coordinator, arguments.processes, arguments.process)
    joins = arguments.distributed or any(value is not None for value in cluster)
    if joins:
        distributed.join(cluster)
    if not joins or distributed.is_main_process():
        _require_writable(arguments.workdir)
    from resjax.train.loop import require_program, train
    from resjax.train.progress import console
    from resjax.train.step import keep_compiled

    require_program(config)  # the last that can be refused, and nothing is written yet
    keep_compiled(arguments.workdir / "compiled")
    with (
        open(os.devnull, "w") as nowhere,
        distributed.exit_when_peer_is_lost(),
        stop_on_signals(together=joins, notify=_tell) as stop,
    ):
        out = sys.stdout if distributed.is_main_process() else nowhere
        if arguments.profile:
            _profile(config, arguments.profile, arguments.workdir / "profile", out)
        announce = partial(print, file=out, flush=True)
        with console(out) as listener:
            summary = train(config, arguments.workdir, listener, announce, stop)
        _print_values(summary, out)
        print(f"run folder: {arguments.workdir}", file=out)
    return 0


def _profile(config: Config, steps: int, folder: Path, out: TextIO) -> None:
    """Prints the ten operations on which a step spends most time."""
    from resjax.train.profiling import profile
    from resjax.train.step import program

    rows = [
        (operation.name, f"{1e3 * operation.seconds / steps:.3f} ms", f"{operation.share:.1%}")
        for operation in profile(program(config), steps, folder)[:10]
    ]
    _print_table(("operation", "a step", "share"), rows, out)
    print(f"trace, for Perfetto or XProf: {folder}", file=out)


def _sweep(arguments: argparse.Namespace) -> int:
    from resjax.sweeps.experiment import plan

    planned = plan(arguments.experiment, override(load(arguments.config), arguments.overrides))
    _require_writable(arguments.workdir)
    from resjax.sweeps.local import launch

    with stop_on_signals(notify=_tell) as stop:
        failed = launch(planned, arguments.workdir, arguments.typed, arguments.workers, stop)
    if failed < len(planned.runs):
        _write_report(arguments.workdir, experiment=None)
    if failed:
        where = arguments.workdir / "runs" / "*" / "error.txt"
        print(f"resjax: {failed} of {len(planned.runs)} runs failed; see {where}", file=sys.stderr)
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> int:
    if arguments.experiment is not None and not arguments.experiment.is_file():
        raise UserError(f"--experiment={arguments.experiment}: no such file")
    _write_report(arguments.folder, arguments.experiment)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    config = default_config() if arguments.config is None else load(arguments.config)
    resolved = resolve(override(config, arguments.overrides | {"data.name": arguments.name}))
    if arguments.out.suffix not in (formats := (".png", ".pdf", ".svg")):
        raise UserError(f"--out={arguments.out}: the name must end in {', '.join(formats)}")
    _require_writable(arguments.out.parent, "--out")
    from resjax.data.augmentation import Augmentation
    from resjax.data.datasets import NotPreparedError
    from resjax.data.datasets import load as load_data
    from resjax.data.resident import statistics
    from resjax.data.sheet import sheet

    data = resolved.data
    try:
        dataset = load_data(data.name)
    except NotPreparedError as error:
        raise UserError(str(error)) from error
    figure = sheet(
        dataset.train,
        dataset.class_names,
        statistics(dataset.train.images, data.normalization, colors=data.pca_lighting > 0),
        Augmentation.from_config(data),
        resolved.seed,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)
    print(f"sheet: {arguments.out}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from resjax.train.loop import evaluate

    _print_values(evaluate(arguments.workdir, arguments.checkpoint))
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out and out.suffix not in (".csv", ".json"):
        raise UserError(f"--out={out}: the name must end in .csv or .json")
    _require_there(arguments.checkpoint)
    if out:
        _require_writable(out.parent, "--out")
    from resjax.disk import write_atomically
    from resjax.inference.predict import FORMATS, predict

    weights = _weights(arguments.checkpoint, arguments.which)
    found, left_out = predict(weights, arguments.images, arguments.top, **_batches(arguments))
    _tell_left_out(list(map(str, left_out)))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, FORMATS[out.suffix[1:]](found))
        print(f"predictions: {out}")
    elif arguments.format == "table":
        rows = [
            (str(each.path), name, f"{100 * probability:.2f} %")
            for each in found
            for name, probability in zip(each.classes, each.probabilities, strict=True)
        ]
        _print_table(("image", "class", "probability"), rows)
    else:
        print(FORMATS[arguments.format](found), end="")
    return 0


def _features(arguments: argparse.Namespace) -> int:
    out = arguments.out
    if out.suffix not in (".npz", ".parquet"):
        raise UserError(f"--out={out}: the name must end in .npz or .parquet")
    if bool(arguments.images) == bool(arguments.data):
        raise UserError("`resjax features`: give images, or --data=NAME, one of the two")
    if arguments.images and arguments.split:
        raise UserError(f"--split={arguments.split} is of a dataset: it needs --data=NAME")
    _require_writable(out.parent, "--out")
    from resjax.inference.features import features, of_dataset, of_files, save_features

    split = arguments.split or "train"
    images = of_dataset(arguments.data, split) if arguments.data else of_files(arguments.images)
    _require_there(arguments.checkpoint)
    weights = _weights(arguments.checkpoint, arguments.which)
    found = features(weights, images, arguments.stage, **_batches(arguments))
    _tell_left_out(sorted({*images.origins} - {*found.origins}))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_features(found, out)
    rows, columns = found.values.shape
    print(f"features of {rows:,} images, {columns:,} numbers each: {out}")
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from resjax.inference.features import load_features
    from resjax.inference.probes import probe

    train, test = load_features(arguments.train), load_features(arguments.test)
    _print_values(probe(train, test, arguments.kind))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _require_there(arguments.checkpoint)
    _require_writable(arguments.out.parent, "--out")

    weights = _weights(arguments.checkpoint, arguments.which)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.format == "torchvision":
        from resjax.transfer.exporting import export_torchvision

        export_torchvision(weights, arguments.out)
    else:
        from resjax.inference.program import export_program

        print(f"description: {export_program(weights, arguments.out)}")
    print(f"{arguments.format}: {arguments.out}")
    return 0


def _batches(arguments: argparse.Namespace) -> dict[str, Any]:
    """How images go through a network: keywords of `resjax.inference.images.each_image`."""
    names = ("batch_size", "on_bad_image", "workers")
    return {name: getattr(arguments, name) for name in names}


def _verify(arguments: argparse.Namespace) -> int:
    from resjax.train.verify import verify

    findings = verify(arguments.folder)
    for finding in findings:
        print(f"{finding.path}: {finding.message}")
    damaged = sum(finding.damaged for finding in findings)
    print(f"{damaged} damaged" if damaged else "all whole")
    return 1 if damaged else 0


def _weights(source: str, which: str = "last", options: "Options | None" = None) -> "Weights":
    """Reads weights, wherever they are."""
    from resjax.inference.loading import weights_from

    return weights_from(source, which, _tell, options)


def _require_there(source: str) -> None:
    """Refuses a file that is not there before it takes seconds to say so."""
    if not source.startswith(REMOTE) and not Path(source).exists():
        raise UserError(f"{source}: no such file or folder")


def _import(arguments: argparse.Namespace) -> int:
    _require_there(arguments.weights)
    _require_writable(arguments.out, "--out")
    from resjax.transfer import weights
    from resjax.transfer.importing import Options

    options = Options(
        prefix=arguments.prefix,
        v1=arguments.v1 or None,
        without_head=arguments.backbone,
        class_names=arguments.class_names,
        image_size=arguments.image_size,
    )
    found = _weights(arguments.weights, options=options)
    weights.save(found, arguments.out)
    print(weights.summarize(found))
    print(f"weights folder: {arguments.out}")
    return 0


def _models(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        header = ("name", "depth", "parameters", "MACs", "pixels", "source")
        rows = [
            (
                name,
                str(preset.fields["depth"]),
                f"{preset.parameters:,}",
                f"{preset.macs / 1e6:,.1f} M",
                str(preset.image_size),
                preset.source,
            )
            for name, preset in PRESETS.items()
        ]
        _print_table(header, rows)
        return 0
    try:
        architecture(arguments.name)
    except ValueError as error:
        raise UserError(str(error)) from error
    from resjax.models.count import layers
    from resjax.models.resnet import build

    pixels = PRESETS[arguments.name].image_size
    lines = [
        (
            layer.path,
            layer.kind,
            " x ".join(map(str, layer.output)),
            f"{layer.parameters:,}",
            f"{layer.macs:,}",
        )
        for layer in layers(build(arguments.name), (pixels, pixels, 3))
    ]
    _print_table(("layer", "kind", "output", "parameters", "MACs"), lines)
    return 0


def _list_datasets(arguments: argparse.Namespace) -> int:
    from resjax.data import DATASETS
    from resjax.data.examples import DataError
    from resjax.data.prepared import prepared_sets

    try:
        here = {prepared.name: prepared for prepared in prepared_sets()}
    except DataError as error:
        raise UserError(str(error)) from error
    rows = []
    for name, spec in DATASETS.items():
        prepared = here.pop(spec.tfds, None)
        rows.append(
            (
                name,
                f"{spec.train_images + spec.test_images:,}",
                f"{spec.classes:,}",
                " x ".join(map(str, spec.image_shape or ("sizes differ",))),
                f"{prepared.bytes / 1e6:,.1f} MB" if prepared else "-",
                "embedded" if spec.embedded else _where(prepared),
            )
        )
    for name, prepared in here.items():
        size = f"{prepared.bytes / 1e6:,.1f} MB"
        images = f"{sum(prepared.images.values()):,}"
        rows.append((f"tfds:{name}", images, "", "", size, _where(prepared)))
    _print_table(("name", "images", "classes", "shape", "on disk", "where"), rows)
    return 0


def _where(prepared: "Prepared | None") -> str:
    if prepared is None:
        return "-"
    strange = f" ({prepared.format}: only TensorFlow reads it)"
    return f"{prepared.folder}{strange if prepared.format != 'array_record' else ''}"


def _prepare_dataset(arguments: argparse.Namespace) -> int:
    from resjax.data.examples import DataError
    from resjax.data.preparation import prepare

    try:
        folder = prepare(arguments.name, arguments.source, partial(print, flush=True))
    except DataError as error:
        raise UserError(str(error)) from error
    print(f"prepared: {folder}")
    return 0


def _write_report(folder: Path, experiment: Path | None) -> None:
    from resjax.analysis.report import write_report
    from resjax.analysis.runs import load_curves, load_runs, summarize

    # Read before anything is drawn: what is missing or damaged is no fault of ours, as what the
    # drawing raises would be.
    try:
        runs = load_runs(folder)
        load_curves(runs)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    report = write_report(folder, experiment)
    _print_summary(summarize(runs))
    for path in sorted((report.parent / "figures").glob("*.png")):
        print(f"figure: {path}, .pdf, .svg")
    print(f"report: {report}")


def _print_summary(summary: "pd.DataFrame") -> None:
    """Prints means and sample standard deviations over seeds."""
    groups = [name for name in summary if "." in str(name)]
    header = [str(name).rpartition(".")[2] for name in groups]
    rows = [
        (
            *(str(row[name]) for name in groups),
            str(row["seeds"]),
            *(_mean(row, name) for name in ("train_error", "test_error")),
        )
        for row in summary.to_dict("records")
    ]
    _print_table((*header, "seeds", "train error", "test error"), rows)


def _mean(row: dict[Hashable, Any], name: str) -> str:
    mean, deviation = 100 * row[f"{name}_mean"], 100 * row[f"{name}_std"]
    if math.isnan(mean):
        return "-"
    return f"{mean:.2f} %" if math.isnan(deviation) else f"{mean:.2f} ± {deviation:.2f} %"


def _print_values(values: dict[str, Any], out: TextIO | None = None) -> None:
    for name, value in values.items():
        form = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:20}{form}", file=out)


def _tell(text: str) -> None:
    print(f"resjax: {text}", file=sys.stderr, flush=True)


def _tell_left_out(images: Sequence[str]) -> None:
    if images:
        more = ", ..." * (len(images) > 10)
        _tell(f"{len(images)} left out, cannot be decoded: {', '.join(images[:10])}{more}")


def _print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], out: TextIO | None = None
) -> None:
    """Prints columns as wide as they must be; the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print("  ".join((first.ljust(widths[0]), *cells)).rstrip(), file=out)


def _require_writable(folder: Path, option: str = "--workdir") -> None:
    """Refuses a folder that cannot be written, while nothing has been computed; leaves no trace."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        for path in missing:
            path.rmdir()
    except OSError as error:
        raise UserError(f"{option}={folder}: cannot write there: {error.strerror}") from error


def _split_overrides(typed: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.field=value` and `--config.field value` out of the command line."""
    rest, overrides = [], {}
    words = iter(typed)
    for word in words:
        field, equals, value = word.partition("=")
        if not field.startswith("--config."):
            rest.append(word)
            continue
        given = value if equals else next(words, None)
        if given is None or (not equals and given.startswith("--")):
            raise UserError(f"{field} needs a value: {field}=VALUE")
        overrides[field.removeprefix("--config.")] = given
    return rest, overrides


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"`{self.prog}`: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="resjax", description="Residual-network experiments in JAX and Flax.")
    parser.add_argument("--version", action="version", version=f"resjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, summary: str, epilog: str = "", among: Any = commands
    ) -> argparse.ArgumentParser:
        made = among.add_parser(
            name, help=summary, description=summary, epilog=epilog, allow_abbrev=False
        )
        made.set_defaults(run=run)
        return made

    fields = "Every field of the config has an option: --config.model.depth=56."
    train = command("train", _train, "Train one network, or resume it.", fields)
    _add_config(train)
    _add_workdir(train, "the run folder")
    train.add_argument(
        "--profile", type=_count, metavar="N", help="trace N steps first; print what costs most"
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes that SLURM, Open MPI or the TPU slice started",
    )
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, to join by hand")
    train.add_argument("--processes", type=_count, metavar="N", help="how many there are")
    train.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")

    sweep = command("sweep", _sweep, "Run an experiment's sweep, then its report.", fields)
    sweep.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="experiments/X.py")
    _add_config(sweep)
    _add_workdir(sweep, "the sweep folder")
    sweep.add_argument("--launcher", choices=("local",), default="local", help="where runs go")
    sweep.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="runs that train at the same time, each on its share of cores or GPUs; "
        "if not given, one a GPU, or one a core where there is none",
    )

    report = command("report", _report, "Figures, tables and report.html from run folders.")
    report.add_argument("folder", type=Path, metavar="DIR", help="a sweep or run folder")
    report.add_argument("--experiment", type=Path, metavar="FILE", help="whose figures to draw")

    evaluate = command("evaluate", _evaluate, "Evaluate one of a run's checkpoints.")
    _add_workdir(evaluate, "the run folder")
    evaluate.add_argument(
        "--checkpoint",
        type=_which,
        default="last",
        metavar="WHICH",
        help="last, best (of the least test error), or a step; last if not given",
    )

    importing = command(
        "import",
        _import,
        "Turn weights of torchvision, timm, Hugging Face, Keras or BiT into a weights folder.",
    )
    importing.add_argument(
        "weights",
        metavar="WEIGHTS",
        help=".pth, .safetensors, .h5, .keras, .npz, a folder of Hugging Face, a run folder, "
        "hub:OWNER/NAME or https://...",
    )
    importing.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder")
    importing.add_argument("--backbone", action="store_true", help="leave out the head")
    importing.add_argument(
        "--prefix", default="", help="of the network's names in a file of more, as backbone.body."
    )
    importing.add_argument(
        "--v1", action="store_true", help="bottlenecks stride in their first 1x1"
    )
    importing.add_argument(
        "--class-names", type=Path, metavar="FILE", help="text with the name of a class a line"
    )
    importing.add_argument(
        "--image-size", type=_count, metavar="N", help="pixels, if not those of the evaluation"
    )

    predict = command("predict", _predict, "Classify images by a trained network.")
    _add_checkpoint(predict, "--checkpoint", required=True)
    _add_images(predict, "+")
    predict.add_argument("--top", type=_count, default=5, metavar="K", help="classes an image")
    either = predict.add_mutually_exclusive_group()
    either.add_argument("--format", choices=("table", "csv", "json"), default="table")
    either.add_argument("--out", type=Path, metavar="FILE", help="predictions.csv or .json")

    features = command("features", _features, "What a network makes of images before its head.")
    _add_checkpoint(features, "--checkpoint", required=True)
    _add_images(features, "*")
    features.add_argument("--data", metavar="NAME", help="a dataset in place of images")
    features.add_argument("--split", help="of it: train, test, or such as train[:20%%]")
    features.add_argument("--stage", help="such as stage3; the last if not given")
    features.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="features.npz or .parquet"
    )

    probe = command("probe", _probe, "How well features tell classes.")
    probe.add_argument("train", type=Path, metavar="TRAIN", help="features that are learned from")
    probe.add_argument("test", type=Path, metavar="TEST", help="features whose classes are told")
    probe.add_argument(
        "--kind",
        choices=("linear", "knn"),
        default="linear",
        help="logistic regression, or the nearest neighbours",
    )

    export = command("export", _export, "A network for other programs.")
    _add_checkpoint(export, "checkpoint")
    export.add_argument(
        "--format",
        choices=("stablehlo", "torchvision"),
        required=True,
        help="a program with its weights, or a safetensors file of torchvision's names",
    )
    export.add_argument("--out", type=Path, required=True, metavar="FILE", help="is replaced")

    verify = command("verify", _verify, "Check every checkpoint, metrics file and weights folder.")
    verify.add_argument("folder", type=Path, metavar="DIR", help="a run, a sweep, or any above")

    models = command("models", _models, "Architectures; of one, its layers.")
    models.add_argument("name", nargs="?", metavar="NAME", help="such as cifar_resnet56")

    data = command("data", None, "Datasets: where they are, preparing them, looking at them.")
    among = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    command("list", _list_datasets, "Datasets, and where they are on this machine.", among=among)
    prepare = command("prepare", _prepare_dataset, "Prepare a dataset for reading.", among=among)
    prepare.add_argument("name", metavar="NAME", help="such as cifar10, or tfds:NAME")
    prepare.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="where its archives lie; without it they are downloaded",
    )
    show = command(
        "show", _show, "Training images beside their augmentations.", fields, among=among
    )
    show.add_argument("name", metavar="NAME", help="such as digits")
    show.add_argument("--config", metavar="FILE", help="configs/X.py; without it the defaults")
    show.add_argument("--out", type=Path, required=True, metavar="FILE", help="sheet.png")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_count.__name__ = "whole number from 1 up"  # what argparse calls it in its complaint


def _cardinal(text: str) -> int:
    if (number := int(text)) < 0:
        raise ValueError
    return number


_cardinal.__name__ = "whole number from 0 up"


def _which(text: str) -> str:
    if text not in ("last", "best") and not text.isdecimal():
        raise ValueError
    return text


_which.__name__ = "last, best or step"


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, metavar="FILE", help="configs/X.py")


def _add_workdir(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--workdir", type=Path, required=True, metavar="DIR", help=what)


def _add_checkpoint(command: argparse.ArgumentParser, name: str, **options: Any) -> None:
    command.add_argument(
        name, metavar="WEIGHTS", help="a run folder, a weights folder, or a weights file", **options
    )
    command.add_argument(
        "--which", type=_which, default="last", help="of a run: last, best, or a step"
    )


def _add_images(command: argparse.ArgumentParser, number: str) -> None:
    """What goes through a network, and how."""
    command.add_argument(
        "images", type=Path, nargs=number, metavar="IMAGE", help="PNG, JPEG, ..., or a folder"
    )
    command.add_argument(
        "--on-bad-image", choices=("error", "skip"), default="error", help="if one is damaged"
    )
    command.add_argument(
        "--batch-size", type=_count, default=64, metavar="N", help="images at a time"
    )
    command.add_argument(
        "--workers",
        type=_cardinal,
        default=0,
        metavar="N",
        help="processes that decode; 0 is a thread",
    )
