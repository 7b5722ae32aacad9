MESSAGES = {
    "documents": "Files and documents become two files: what a stranger's bytes go through is found by its name",
    "data": "quiz becomes data: questions with their prompts, readers, sources, what is held out",
    "models": "moe becomes models and scoring: what a model is, apart from how it is asked; MoeBlock needs nobody",
    "profiling": "profiling is flat: schema, storage, recorder, locks and workers, findings",
    "edits": "interventions becomes edits, flat: a file is a concept, named as the field names it",
    "checkpoints": "checkpoints is flat: layouts, shards, simulation and the held-out check each in one file",
    "evaluation": "evaluation is flat: stats, results, cross-fitting, searches, ablation",
    "healing": "healing is flat: rows, adapters, objectives, state and trainer",
    "reporting": "reporting is flat and publishing becomes hub: one module draws, one shows, one makes the card",
    "recipes": "recipe becomes recipes and commands: what a file says, and what its stages do",
    "cli": "cli: commands in four files, by what they are for",
    "texts": "README, the layers and their test say where things are now; no file name twice, no package in a package",
}
