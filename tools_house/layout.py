"""Where everything goes: new file -> (summary, [old files]); plus symbols that go elsewhere and renames."""

ORDER = (
    "errors", "files", "documents", "data", "models", "scoring", "profiling", "edits",
    "checkpoints", "evaluation", "healing", "reporting", "hub", "recipes", "commands", "cli",
)

# None as summary: the docstring of the (one) old file stays.
TARGETS: dict[str, tuple[str | None, list[str]]] = {
    "__init__.py": (None, ["__init__.py"]),
    "__main__.py": (None, ["__main__.py"]),
    "errors.py": (None, ["errors.py"]),
    "files.py": (
        "Files: bounded reads, strict JSON, private temporary files, atomic writes, no secrets.",
        ["documents/reading.py", "documents/private.py", "documents/secrets.py"],
    ),
    "documents.py": (
        "JSON files of this tool, held as pydantic models: read and checked, or refused in one line.",
        ["documents/records.py"],
    ),
    # data: what is read
    "data/__init__.py": (None, ["quiz/__init__.py"]),
    "data/questions.py": (
        "Questions, quizzes and their prompts, and the same questions with shuffled choices.",
        ["quiz/questions.py", "quiz/prompts.py", "quiz/shuffled.py"],
    ),
    "data/readers.py": (
        "Readers of questions in three forms, row by row; every fault names its file and line.",
        ["quiz/readers.py"],
    ),
    "data/sources.py": (
        "Where quizzes come from: a Hendrycks CSV folder, JSON lines, or a data set of the hub.",
        ["quiz/sources.py", "healing/weighted.py"],
    ),
    "data/held_out.py": (None, ["quiz/splits.py"]),
    # models
    "models/__init__.py": (
        "Mixture-of-Experts models, seen through one contract.", ["moe/__init__.py"]),
    "models/moe_block.py": (
        "A MoE block as the contract sees it: its router, its experts, and what its gate does.", []),
    "models/hooks.py": (
        "Watching routers and experts, and changing a router's logits, without leaving a trace.",
        ["moe/observers.py", "moe/router_ops.py"],
    ),
    "models/gate_laws.py": (None, ["moe/gate_laws.py"]),
    "models/find_blocks.py": (
        "The MoE contract: which modules of a model route, which are experts, what the gate does.",
        ["moe/residual.py", "moe/contract.py"],
    ),
    "models/kernels.py": (
        "Kernels of a forward pass on the CPU: matrix products, and experts one after another.",
        ["moe/kernels/products.py", "moe/kernels/experts.py"],
    ),
    "models/memory.py": (None, ["moe/memory.py"]),
    "models/checkpoint_dir.py": (
        "A checkpoint's folder: which files are read, its JSON, and one hash of its contents.",
        ["moe/stored/objects.py", "moe/stored/folder.py", "moe/stored/fingerprints.py"],
    ),
    "models/safetensors_index.py": (None, ["moe/stored/headers.py"]),
    "models/validate.py": (
        "Checks before and after loading: config.json, weights, tokenizer, supported kinds.",
        ["moe/loading/checks/refusals.py", "moe/loading/checks/supported.py",
         "moe/stored/counts.py", "moe/loading/checks/tokenizer.py",
         "moe/loading/checks/weights.py"],
    ),
    "models/meta_model.py": (None, ["moe/loading/skeleton.py"]),
    "models/modeling_exact.py": (None, ["moe/loading/modeling_exact.py"]),
    "models/load.py": (
        "From a folder or a hub id to a model whose experts can be watched and whose bytes are known.",
        ["moe/loading/devices.py", "moe/loading/own_code.py", "moe/loading/sources.py",
         "moe/loading/models.py"],
    ),
    # scoring: tokens to log-probabilities
    "scoring/__init__.py": ("Tokens to log-probabilities: packed questions, one pass, each choice's log p.",
                            ["moe/kernels/__init__.py"]),
    "scoring/packing.py": (None, ["moe/packing.py"]),
    "scoring/attention.py": (None, ["moe/kernels/attention.py"]),
    "scoring/passes.py": (
        "One chunk's forward passes, in turn, and the way of scoring that suits a model.",
        ["moe/ways.py", "moe/kernels/last_block.py", "moe/passes.py"],
    ),
    "scoring/engine.py": (
        "The scoring engine: log-probabilities of a chunk's choices, no token run twice, none a pad.",
        ["moe/context.py", "moe/nonfinite.py", "moe/engine.py"],
    ),
    "scoring/router_bias.py": (
        "Biases on router logits and factors on gate weights while a model runs.",
        ["moe/tilting.py"]),
    "scoring/replay.py": (None, ["moe/replay.py"]),
    # profiling
    "profiling/__init__.py": (None, ["profiling/__init__.py"]),
    "profiling/schema.py": (
        "The schema of a profile: `profile.json`, and what the arrays of a chunk must be.",
        ["profiling/sound.py", "profiling/info.py"],
    ),
    "profiling/storage.py": (
        "A profile on disk: `profile.json`, one safetensors file per chunk, and `run.json`.",
        ["profiling/chunks.py", "profiling/store.py", "profiling/sums.py", "profiling/part.py"],
    ),
    "profiling/token_sums.py": (
        "Sums over every token, expert by expert, and the largest value that each gave.",
        ["profiling/recording/contributions.py", "profiling/recording/token_sums.py"],
    ),
    "profiling/recorder.py": (
        "Records what a profile stores of one chunk's forward passes.",
        ["profiling/recording/finite.py", "profiling/recording/recorder.py"],
    ),
    "profiling/locks.py": (
        "Claims and run locks: which process works on what in a folder that several share.",
        ["profiling/sharing/claims.py", "profiling/sharing/alone.py"],
    ),
    "profiling/workers.py": (
        "One profile folder, any number of processes: opened or refused, dealt out, finished.",
        ["profiling/sharing/work.py", "profiling/sharing/folder.py"],
    ),
    "profiling/measure.py": (
        "Profiling itself: a quiz through a model, chunk by chunk, into a folder that can be resumed.",
        ["profiling/measure.py", "profiling/perturb.py"],
    ),
    "profiling/statistics.py": (None, ["profiling/statistics.py"]),
    "profiling/significance.py": (
        "Is an expert's record chance? Each expert against the questions of its subjects without it.",
        ["profiling/evidence/by_subject.py", "profiling/evidence/significance.py"],
    ),
    "profiling/findings.py": (
        "All that a profile says, and how sure one can be of it: margins, perturbations, suspects.",
        ["profiling/evidence/margins.py", "profiling/evidence/perturbations.py",
         "profiling/evidence/findings.py"],
    ),
    # edits
    "edits/__init__.py": (None, ["interventions/__init__.py"]),
    "edits/plan.py": (
        "The plan: which experts stay, which get a bias or a scale; their ids, and what is valid.",
        ["interventions/plan.py", "interventions/lineage.py", "interventions/allowed.py"],
    ),
    "edits/criteria.py": (
        "Criteria that rank experts: one small pure function each, and all of them by name.",
        ["interventions/criteria/blind.py", "interventions/criteria/observed.py",
         "interventions/criteria/reconstruction.py", "interventions/criteria/scoring.py"],
    ),
    "edits/ranking.py": (
        "The order in which experts are kept, and those that are protected whatever their score.",
        ["interventions/criteria/protection.py", "interventions/ranking.py"],
    ),
    "edits/budget.py": (None, ["interventions/budgets.py"]),
    "edits/prune.py": (
        "Which experts stay, and how much of the traffic the removed ones carried.",
        ["interventions/prune.py", "interventions/touched.py"],
    ),
    "edits/splits.py": (
        "Which questions choose an edit, which judge it, and whether these had been used before.",
        ["interventions/judged.py", "interventions/questions.py"],
    ),
    "edits/calibrate.py": (
        "Calibration passes of the unedited model: bias directions, gate rescaling, mean outputs.",
        ["interventions/calibration/__init__.py", "interventions/calibration/listening.py",
         "interventions/calibration/direction.py", "interventions/calibration/fold.py",
         "interventions/calibration/outputs.py", "interventions/calibration/activations.py"],
    ),
    "edits/merge_groups.py": (
        "Which experts become one: how alike they are, the groups, and which neurons correspond.",
        ["interventions/merging/alignment.py", "interventions/merging/grouping.py",
         "interventions/merging/gathering.py", "interventions/merging/asking.py"],
    ),
    "edits/merge_router.py": (None, ["interventions/merging/routing.py"]),
    "edits/reweight_select.py": (
        "Which experts to reweight: outcomes of questions, scores and contrasts, the admission gap.",
        ["interventions/reweighting/admission.py", "interventions/reweighting/records.py",
         "interventions/reweighting/choosing.py"],
    ),
    "edits/reweight_tune.py": (None, ["interventions/reweighting/tuning.py"]),
    "edits/reweight.py": (
        "Reweighting: expert expressions such as `3:12=0.25`, settings, and the draft they make.",
        ["interventions/reweighting/targets.py", "interventions/reweighting/drafting.py",
         "interventions/reweighting/asked.py"],
    ),
    # checkpoints
    "checkpoints/__init__.py": (None, ["checkpoints/__init__.py"]),
    "checkpoints/tensor_names.py": (None, ["checkpoints/layouts/names.py"]),
    "checkpoints/shards.py": (
        "Safetensors shards laid out and written without a model: kept tensors go over as bytes.",
        ["checkpoints/files/copying.py", "checkpoints/files/shards.py",
         "checkpoints/files/streaming.py"],
    ),
    "checkpoints/output_dir.py": (None, ["checkpoints/files/folders.py"]),
    "checkpoints/stock.py": (None, ["checkpoints/layouts/stock.py"]),
    "checkpoints/exact.py": (None, ["checkpoints/layouts/exact.py"]),
    "checkpoints/merged.py": (
        "Merged experts as a rewrite of the tensors on disk: averages over aligned neurons.",
        ["checkpoints/layouts/neurons.py", "checkpoints/layouts/merged.py"],
    ),
    "checkpoints/export.py": (
        "A plan becomes a checkpoint folder, in the original names; no model is instantiated.",
        ["checkpoints/layouts/further_tokens.py", "checkpoints/export.py"],
    ),
    "checkpoints/simulate.py": (
        "A plan carried out in the unedited model while it runs, exactly or as its checkpoint will.",
        ["checkpoints/unedited.py", "checkpoints/unwritten/carried.py",
         "checkpoints/merging/unedited_router.py"],
    ),
    "checkpoints/held_out_check.py": (
        "What an edit did to held-out questions, scored in both models; the figures go into the plan.",
        ["checkpoints/answering.py", "checkpoints/agreement.py", "checkpoints/proof.py"],
    ),
    "checkpoints/build.py": (
        "The stages behind `prune`, `reweight` and `merge`: calibrate, export, check, rename.",
        ["checkpoints/build.py", "checkpoints/merging/merge.py"],
    ),
    "checkpoints/size.py": (
        "How large a model or a cut is, and the largest cut that fits in a size.",
        ["evaluation/size.py", "checkpoints/unwritten/sizing.py",
         "checkpoints/unwritten/choosing.py"],
    ),
    "checkpoints/lora.py": (
        "A LoRA adapter in peft's folder: what it adapts, and where its tensors belong in the model.",
        ["checkpoints/adapters/reading.py", "checkpoints/adapters/places.py"],
    ),
    "checkpoints/lora_slice.py": (
        "A LoRA adapter of the unpruned model cut along, and written with the checkpoint.",
        ["checkpoints/adapters/slicing.py", "checkpoints/adapters/carrying.py"],
    ),
    # evaluation
    "evaluation/__init__.py": (None, ["evaluation/__init__.py"]),
    "evaluation/stats.py": (
        "Accuracy of one model and comparison of two on the same questions, with uncertainty.",
        ["evaluation/accuracy.py", "evaluation/comparison.py"],
    ),
    "evaluation/results.py": (
        "`results.json`, and the folder that a long run fills. No torch here.",
        ["evaluation/results.py", "evaluation/folders.py"],
    ),
    "evaluation/evaluate.py": (None, ["evaluation/evaluate.py"]),
    "evaluation/lm_eval_export.py": (
        "Results for other programs: lm-evaluation-harness's file, and `predictions.parquet`.",
        ["evaluation/outputs/harness.py", "evaluation/outputs/predictions.py"],
    ),
    "evaluation/cross_fit.py": (
        "Cross-fitting: chosen on four folds, scored on the fifth; random controls; `proof.json`.",
        ["evaluation/proving/folds.py", "evaluation/proving/control.py",
         "evaluation/proving/crossfit.py", "evaluation/proving/outcome.py"],
    ),
    "evaluation/reweight_search.py": (
        "The stages behind `reweight`, `--tune` and `--prove`: one loaded model, scored repeatedly.",
        ["interventions/reweighting/rescoring.py", "evaluation/proving/decision.py",
         "evaluation/proving/tilted.py"],
    ),
    "evaluation/search_results.py": (
        "`sweep.json` and `audit.json`: cuts and single ablations that were tried. No torch here.",
        ["evaluation/sweeping/outcome.py", "evaluation/sweeping/grid.py",
         "evaluation/auditing/outcome.py"],
    ),
    "evaluation/sweep.py": (None, ["evaluation/sweeping/sweep.py"]),
    "evaluation/ablation.py": (
        "The stage behind `audit`: experts are ablated one at a time, and criteria scored against it.",
        ["evaluation/auditing/sample.py", "evaluation/auditing/verdict.py",
         "evaluation/auditing/audit.py"],
    ),
    # healing
    "healing/__init__.py": (None, ["healing/__init__.py"]),
    "healing/settings.py": (None, ["healing/asking.py"]),
    "healing/rows.py": (
        "Questions, texts and chats as rows of token ids, and several sources of rows in one order.",
        ["healing/data/texts.py", "healing/data/rows.py", "healing/data/mixing.py"],
    ),
    "healing/leakage.py": (
        "Nothing that is later scored is trained on; and the questions that judge a healed model.",
        ["healing/data/judges.py", "healing/data/leaks.py"],
    ),
    "healing/data.py": (None, ["healing/data/sources.py"]),
    "healing/adapters.py": (
        "Low-rank adapters in training, and how they become weights of the checkpoint.",
        ["healing/training/adapters.py", "healing/written.py"],
    ),
    "healing/objectives.py": (
        "Training objectives: batches, the teacher's words, and one loss per trained position.",
        ["healing/training/objectives.py", "healing/training/projection.py",
         "healing/training/batches.py", "healing/training/teacher.py"],
    ),
    "healing/teacher_cache.py": (None, ["healing/training/cache.py"]),
    "healing/state.py": (
        "States of a training run: what is saved, which are kept, and who may go on from one.",
        ["healing/training/saved.py", "healing/training/states.py", "healing/begun.py"],
    ),
    "healing/micro_batch.py": (None, ["healing/training/micro_batch.py"]),
    "healing/trainer.py": (
        "transformers' Trainer with losses of its own and no pickle, and one training run with it.",
        ["healing/training/balance.py", "healing/training/trainer.py", "healing/training/fit.py"],
    ),
    "healing/heal.py": (
        "The stage behind `heal`: read, train, write, check on questions that were not used.",
        ["healing/lineage.py", "healing/planning.py", "healing/judging.py", "healing/heal.py"],
    ),
    # reporting
    "reporting/__init__.py": (None, ["reporting/__init__.py"]),
    "reporting/tables.py": (
        "A table as data, and its forms: rich for people, Markdown, CSV; text that is never markup.",
        ["reporting/tables.py", "publishing/card/markup.py"],
    ),
    "reporting/edit_tables.py": (
        "Cuts, merges, reweightings and healing in tables and words.",
        ["reporting/cuts.py", "reporting/merging.py", "reporting/healing.py",
         "reporting/proving.py", "reporting/proofs.py"],
    ),
    "reporting/profile_tables.py": (
        "A profile as tables: the paper's Tables 1 to 7 (arXiv 2502.17187), its evidence, criteria.",
        ["reporting/profiles.py", "reporting/findings.py", "reporting/criteria.py"],
    ),
    "reporting/eval_tables.py": (
        "Plans, results, sweeps and audits in tables, words and figures.",
        ["reporting/outcomes.py", "reporting/sweeps.py", "reporting/audits.py"],
    ),
    "reporting/plots.py": (
        "Every figure, as data and as PNG and SVG; matplotlib is imported when one is drawn.",
        ["reporting/figures.py", "reporting/page/figures.py", "reporting/page/drawing.py"],
    ),
    "reporting/page_parts.py": (None, ["reporting/page/parts.py"]),
    "reporting/show.py": (
        "What `show` finds at a path and a report in a run's folder.",
        ["reporting/page/gathering.py", "reporting/shown.py"],
    ),
    "reporting/page_sections.py": (
        "What the page says of edits, evaluations, searches and provenance.",
        ["reporting/page/sections/changes.py", "reporting/page/sections/outcomes.py",
         "reporting/page/sections/searches.py", "reporting/page/sections/provenance.py"],
    ),
    "reporting/expert_maps.py": (None, ["reporting/page/sections/experts.py"]),
    "reporting/page.py": (
        "`report.html`: the page on disk, one file that needs nothing else, its figures beside it.",
        ["reporting/page/sections/__init__.py", "reporting/page/writing.py"],
    ),
    # hub
    "hub/__init__.py": (None, ["publishing/__init__.py"]),
    "hub/provenance.py": (
        "A checkpoint's parts held together, the base under it, its licence and its evaluations.",
        ["publishing/verify.py", "publishing/card/evidence.py", "publishing/card/origin.py"],
    ),
    "hub/card.py": (
        "The model card: everything that is known of a checkpoint, put into the template and checked.",
        ["publishing/card/changes.py", "publishing/card/loaders.py", "publishing/card/text.py"],
    ),
    "hub/repository.py": (
        "The repository on the Hub: whose it is, the one commit that changes it, its refusals.",
        ["publishing/faults.py", "publishing/repository.py"],
    ),
    "hub/upload.py": (None, ["publishing/hub.py"]),
    # recipes
    "recipes/__init__.py": (None, ["recipe/__init__.py"]),
    "recipes/recipe_schema.py": (
        "What a recipe may say: its values, the sections of its stages, its variants.",
        ["recipe/values.py", "recipe/sections.py", "recipe/model.py"],
    ),
    "recipes/loader.py": (None, ["recipe/reading.py"]),
    "recipes/stages.py": (None, ["recipe/stages.py"]),
    "recipes/fingerprints.py": (None, ["recipe/record/hashes.py"]),
    "recipes/manifest.py": (
        "`manifest.json` of a run folder: what each stage was made from, what it made, what is due.",
        ["recipe/record/manifest.py", "recipe/record/inputs.py", "recipe/record/ledger.py"],
    ),
    # commands
    "commands/__init__.py": (
        "What each kind of stage does, through the same stage functions as the commands.",
        ["recipe/acts/__init__.py"]),
    "commands/ui.py": (None, ["recipe/acts/job.py"]),
    "commands/measure_stages.py": (
        "Stages that measure, show and publish: profile, show, eval, report, publish.",
        ["recipe/acts/measuring.py", "recipe/acts/giving.py"],
    ),
    "commands/edit_stages.py": (None, ["recipe/acts/changing.py"]),
    "commands/heal_stages.py": (None, ["recipe/acts/healing.py"]),
    "commands/run_recipe.py": (None, ["recipe/run.py"]),
    # cli
    "cli/__init__.py": (None, ["cli/__init__.py"]),
    "cli/options.py": (
        "Options that several commands share, each defined once, and what they name.",
        ["cli/options.py", "cli/reading.py"]),
    "cli/progress.py": (
        "What a terminal shows: output, one line of progress on stderr, how to go on after a stop.",
        ["cli/output.py", "cli/running.py"],
    ),
    "cli/edit_commands.py": (
        "The commands `reweight` and `merge`, and how any choice becomes a checkpoint or a plan.",
        ["cli/changing.py", "cli/deciding.py", "cli/tilting.py", "cli/merging.py"],
    ),
    "cli/prune_command.py": (
        "The command `prune`: a checkpoint, a plan, or what each of several cuts would answer.",
        ["cli/sweeping.py", "cli/pruning.py"],
    ),
    "cli/measure_commands.py": (
        "Commands that measure and show: `profile`, `eval`, `show`, `audit`.",
        ["cli/measuring.py", "cli/auditing.py"],
    ),
    "cli/other_commands.py": (
        "The commands `heal`, `report`, `publish` and `run`.",
        ["cli/healing.py", "cli/reporting.py", "cli/publishing.py", "cli/recipes.py"],
    ),
}

# The steps of `move.py REPO --step NAME`, each a commit: prefixes of new files.
STEPS: dict[str, tuple[str, ...]] = {
    "documents": ("__init__.py", "__main__.py", "errors.py", "files.py", "documents.py"),
    "data": ("data/",),
    "models": ("models/", "scoring/"),
    "profiling": ("profiling/",),
    "edits": ("edits/",),
    "checkpoints": ("checkpoints/",),
    "evaluation": ("evaluation/",),
    "healing": ("healing/",),
    "reporting": ("reporting/", "hub/"),
    "recipes": ("recipes/", "commands/"),
    "cli": ("cli/",),
    "texts": (),  # README's tree, the layers, what a rule cannot change
}

# Old packages whose docstring says nothing that its new place does not.
DROPPED = [
    "checkpoints/adapters/__init__.py", "checkpoints/files/__init__.py",
    "checkpoints/layouts/__init__.py", "checkpoints/merging/__init__.py",
    "checkpoints/unwritten/__init__.py", "documents/__init__.py",
    "evaluation/auditing/__init__.py", "evaluation/outputs/__init__.py",
    "evaluation/proving/__init__.py", "evaluation/sweeping/__init__.py",
    "healing/data/__init__.py", "healing/training/__init__.py",
    "interventions/criteria/__init__.py", "interventions/merging/__init__.py",
    "interventions/reweighting/__init__.py", "moe/loading/__init__.py",
    "moe/loading/checks/__init__.py", "moe/stored/__init__.py",
    "profiling/evidence/__init__.py", "profiling/recording/__init__.py",
    "profiling/sharing/__init__.py", "publishing/card/__init__.py",
    "recipe/record/__init__.py", "reporting/page/__init__.py",
]

# Data files: old -> new.
DATA = {
    "py.typed": "py.typed",
    "publishing/card/card.md.jinja": "hub/card.md.jinja",
    "reporting/page/template/": "reporting/template/",
}

# Old package -> new package, for words in texts.
PACKAGES = {
    "quiz": "data", "moe": "models", "moe.loading": "models", "moe.stored": "models",
    "moe.kernels": "models", "interventions": "edits", "publishing": "hub", "recipe": "recipes",
    "documents": "documents", "profiling.evidence": "profiling", "recipe.acts": "commands",
    "publishing.card": "hub", "reporting.page": "reporting",
}

# (old file, symbol) -> new file
SYMBOLS: dict[tuple[str, str], str] = {
    ("profiling/chunks.py", "write_atomically"): "files.py",
    # A base without imports of other modules, so that nobody needs TYPE_CHECKING to name it.
    ("moe/gate_laws.py", "Scoring"): "models/moe_block.py",
    ("moe/gate_laws.py", "Selection"): "models/moe_block.py",
    ("moe/gate_laws.py", "SCORES"): "models/moe_block.py",
    ("moe/contract.py", "SELECTION_BIAS"): "models/moe_block.py",
    ("moe/gate_laws.py", "WeightRule"): "models/moe_block.py",
    ("moe/router_ops.py", "RouterCall"): "models/moe_block.py",
    ("moe/router_ops.py", "LogitsOp"): "models/moe_block.py",
    ("moe/residual.py", "Residual"): "models/moe_block.py",
    ("moe/contract.py", "MoeBlock"): "models/moe_block.py",
    ("moe/contract.py", "_at_hand"): "models/moe_block.py",
    ("moe/contract.py", "_owned"): "models/moe_block.py",
    ("moe/contract.py", "_direct"): "models/moe_block.py",
    # evaluate.py and lm_eval_export.py both name these
    ("evaluation/outputs/harness.py", "Loaded"): "evaluation/results.py",
    ("evaluation/evaluate.py", "Scored"): "evaluation/results.py",
    ("evaluation/evaluate.py", "Scoring"): "evaluation/results.py",
}

# Symbols whose annotations are quoted, their imports being for type checking only.
QUOTED = {
    ("evaluation/outputs/harness.py", "Loaded"),
    ("evaluation/evaluate.py", "Scored"),
    ("evaluation/evaluate.py", "Scoring"),
}

# Paragraphs that stood in the docstring of a package that is gone.
EXTRA_DOCS = {
    "profiling/significance.py": (
        "Shape suffixes beyond those of `models`: X experts of all blocks together, in order; S subjects;\n"
        "B permutations."
    ),
    "edits/criteria.py": (
        "Higher is kept. Ties are broken by mean α, then by the lower id, in `ranked`."
    ),
}

# old file -> {old name: new name}
RENAMES: dict[str, dict[str, str]] = {
    # names of house.md's table
    "interventions/lineage.py": {"Numbers": "ExpertIds", "numbers_of": "expert_ids"},
    "interventions/allowed.py": {"check_edits": "validate_edits"},
    "interventions/touched.py": {"Touched": "RemovedTraffic", "touched": "removed_traffic"},
    "moe/ways.py": {"Way": "ScoringMode", "suitable_way": "scoring_mode"},
    "moe/loading/checks/refusals.py": {"refusals_of": "translate_errors"},
    "interventions/reweighting/asked.py": {"Asked": "ReweightSettings"},
    "interventions/reweighting/records.py": {"Records": "QuestionOutcomes"},
    "interventions/reweighting/rescoring.py": {"Rescorer": "CachedScorer"},
    "interventions/calibration/listening.py": {"listen": "collect_routing"},
    "checkpoints/unedited.py": {"at_run_time": "apply_at_runtime"},
    "checkpoints/proof.py": {"prove_before": "score_base", "prove_after": "score_edited"},
    "checkpoints/files/folders.py": {"new_folder": "atomic_dir", "check_free": "check_writable"},
    "evaluation/auditing/outcome.py": {"Standing": "CriterionRank", "Harm": "AblationEffect"},
    "recipe/acts/job.py": {"Audience": "UI", "Nobody": "SilentUI"},
    "interventions/reweighting/choosing.py": {"Pick": "SelectedExpert"},
    # two meanings of one name in what became one file
    "interventions/calibration/direction.py": {"_Sums": "_DirectionSums"},
    "interventions/calibration/fold.py": {"_Sums": "_GateSums"},
    "interventions/merging/gathering.py": {"gather": "gather_evidence"},
    "evaluation/proving/control.py": {"_FEWEST": "_FEWEST_MATCHES"},
    "evaluation/proving/outcome.py": {"_FEWEST": "_FEWEST_DRAWS"},
    "healing/data/judges.py": {"_MOST": "_MOST_JUDGES"},
    "healing/data/leaks.py": {"_MOST": "_MOST_DROPPED_SHARE"},
    "publishing/card/markup.py": {"printable": "one_line"},
    "reporting/profiles.py": {"_ranks": "_rank_table", "_experts": "_expert_table"},
    "reporting/findings.py": {"_experts": "_subject_experts_table"},
    "reporting/criteria.py": {"_ranks": "_criteria_ranks", "_experts": "_expert_scores"},
    "reporting/outcomes.py": {"_verdict": "_comparison_verdict", "_interval": "_points_interval"},
    "reporting/sweeps.py": {"_verdict": "_sweep_verdict", "_interval": "_sweep_interval", "_point": "_sweep_point"},
    "reporting/audits.py": {"_point": "_correlation_point"},
    "reporting/figures.py": {"Series": "PointSeries", "Figure": "Canvas"},
    "recipe/values.py": {"_refuse": "_refuse_value"},
    "recipe/model.py": {"_refuse": "_refuse_variant"},
    "cli/healing.py": {"_tell": "_print_progress", "_say": "_print_healed"},
    "cli/publishing.py": {"_say": "_print_published"},
    "cli/recipes.py": {"_tell": "_print_results"},
}
