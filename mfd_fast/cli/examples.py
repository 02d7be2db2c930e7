"""What stands below the options in ``mfd-fast COMMAND --help``."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": (
        "mfd-fast demo",
        "mfd-fast demo --seed 1 --run runs/seed-1",
        "mfd-fast demo --preset mixture-2d --set distill.student_updates=100",
    ),
    "train-teacher": (
        "mfd-fast train-teacher --preset mixture-2d --run runs/points",
        "mfd-fast train-teacher --set data.name=npz --set data.root=mine.npz --run runs/mine",
    ),
    "distill": (
        "mfd-fast distill --preset mixture-2d --run runs/points",
        "mfd-fast distill --teacher package.module:factory --set data.name=npz --set data.root=m.npz --run runs/mine",
        "mfd-fast distill --preset cifar10 --set data.root=data --run runs/cifar10 --resume auto --time-limit 23:45:00",
        "mfd-fast distill --preset sana-1600m --dry-run",
    ),
    "sample": (
        "mfd-fast sample runs/demo --grid samples.png",
        "mfd-fast sample runs/demo --num 1000 --label 3 --out threes.npz",
        "mfd-fast sample runs/sana --prompts prompts.txt --images pictures",
    ),
    "evaluate": (
        "mfd-fast evaluate runs/demo",
        "mfd-fast evaluate pictures --metrics clip,dinov2 --reference real --models weights",
    ),
    "report": ("mfd-fast report runs/demo",),
    "info": ("mfd-fast info --settings", "mfd-fast info runs/demo"),
    "recommend": ("mfd-fast recommend runs/demo --max-error 0.01",),
    "doctor": (
        "mfd-fast doctor",
        "mfd-fast doctor --field package.module:factory --weights teacher.safetensors --data samples.npz",
    ),
    "bench": ("mfd-fast bench --field package.module:factory --data samples.npz --lora-rank 16",),
    "checkpoint": (
        "mfd-fast checkpoint list runs/demo",
        "mfd-fast checkpoint evaluate runs/demo",
        "mfd-fast checkpoint extract runs/demo runs/best",
    ),
    "make-occupancy-toy": ("mfd-fast make-occupancy-toy runs/occupancy-toy/released",),
    "convert-occfm": (
        "mfd-fast convert-occfm nus_sem_occ_training.pkl --infos infos_train.pkl --out data/occfm/training",
    ),
    "import-occfm": ("mfd-fast import-occfm epoch=000199.ckpt --preset occfm --run runs/occfm",),
    "export": (
        "mfd-fast export runs/sana lora",
        "mfd-fast export runs/sana transformer --merge-into path/to/pipeline",
    ),
    "encode-prompts": ("mfd-fast encode-prompts prompts.txt data/prompts --pipeline path/to/pipeline",),
    "verify-data": ("mfd-fast verify-data data/prompts data/occfm",),
    "estimate": (
        "mfd-fast estimate --preset sana-1600m-24gb",
        "mfd-fast estimate --preset sana-1600m --auxiliary full --gpus 2 --zero 2 --checkpointing",
    ),
    "reproduce": ("mfd-fast reproduce step-size --quick",),
}
"""By command, lines as they can be typed."""
