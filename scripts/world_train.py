"""Trains the embedded world's models: the autoencoder, the base, and one teacher per task.

    python scripts/world_train.py vae     --output DIR --seconds 1300
    python scripts/world_train.py widen   --output DIR --drawings FOLDER
    python scripts/world_train.py encode  --output DIR --shard 0
    python scripts/world_train.py base    --output DIR --pictures 4000000 [--resume | --begin-from PIPELINE]
    python scripts/world_train.py save    --output DIR
    python scripts/world_train.py teacher TASK --output DIR --seconds 600

DIR keeps the raw training state (weights, averages, optimizer) and the logs; `save` writes the folder
that ships, pipelines/emoji, from it. To go on with the base, run the same command with --resume, or,
where DIR is lost, begin with --begin-from pipelines/emoji in a DIR that has its vae and tokenizer. Every
process uses one thread; `torchrun --standalone --nproc_per_node 2 scripts/world_train.py base ...`
trains with two, which average gradients. `widen` makes of the autoencoder one that holds other drawings and
colours, too, for a base that is to see pictures (world_image.py); the shipped base has that of `vae`.
"""

import typer
from world_base import base, curve, save
from world_teacher import prompts, teacher
from world_vae import encode, vae, widen

app = typer.Typer(help=__doc__, no_args_is_help=True)
for command in (vae, widen, encode, base, save, curve, prompts, teacher):
    app.command()(command)

if __name__ == "__main__":
    app()
