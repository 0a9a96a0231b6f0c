"""Options that more than one subcommand has. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from align_cli import registry

Model = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Alias, hub id or folder. Default: the adapter's, else tiny-sd15."
    ),
]
Unet = Annotated[
    str | None,
    typer.Option(
        "--unet",
        metavar="PATH",
        help="Separately tuned UNet (SD3: transformer) in place of the model's own; hub id or folder.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER",
        help="Adapter folder, or a name of 'adapters list'; with @SCALE behind it; repeatable, stacks.",
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", metavar="X", help="Guidance scale; 1 is off, 0 leaves out the prompt."),
]
Sampler = Annotated[
    str | None, typer.Option("--sampler", metavar="NAME", help="ddim, ddpm, unipc, lcm; SD3: euler.")
]
Spacing = Annotated[
    str | None, typer.Option("--spacing", metavar="NAME", help="leading, trailing, linspace, lead or lcm.")
]
Eta = Annotated[float | None, typer.Option("--eta", metavar="X", help="DDIM eta; 0 is deterministic.")]
FromStep = Annotated[
    int | None,
    typer.Option(
        "--from-step",
        metavar="N",
        help="Adapters on text encoders work from this step on; 0: in all. Default: as they were made.",
    ),
]
Correction = Annotated[
    str | None,
    typer.Option(
        "--correction", metavar="NAME", help="What self-correction moves: eps, latent, or official (script)."
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", metavar="N", help="Pictures drawn at once.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
]
EncoderDevice = Annotated[
    str | None,
    typer.Option(
        "--encoder-device",
        metavar="NAME",
        help="Of text encoders and autoencoder: cpu, cuda, cuda:N, mps, or offload (on the CPU while idle).",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="float32, float16 or bfloat16.")]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="NAME",
        help="How prompts are read: plain (77 tokens), or segments (long ones, by sentence; not SD3).",
    ),
]
Parser = Annotated[
    str | None,
    typer.Option(
        "--parser",
        metavar="NAME",
        help="What finds the nouns of prompts for --attention: auto, spacy, spacy:MODEL, shapes or plain.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", metavar="NAME", help="See 't2ialign presets list'. Default: the one of the model."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One setting, section.key=value; repeatable."),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="NAME", help=f"Dataset: {', '.join(registry.DATASETS)}."),
]
TrainData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help=f"Dataset: {', '.join(registry.DATASETS)}. Of methods that tell pictures and texts apart: "
        f"{', '.join(registry.GROUNDED)}.",
    ),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data-path",
        metavar="PATH",
        help="Folder of the dataset; of captions, prompts and latents the file.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Write into any folder, and replace the files there that have the same names."
    ),
]
NumProcesses = Annotated[
    int,
    typer.Option(
        "--num-processes",
        metavar="N",
        min=1,
        help="Share the work among N processes of this machine; on GPUs one each.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of text.")]
