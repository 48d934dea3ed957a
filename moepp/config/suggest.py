"""The right key for one that does not exist: what other trainers call it, the same word elsewhere, a near spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_LISTED_KEYS = 14  # an error names all known keys of a section of at most this many
_SHOWN_KEYS = 3
# Keys of earlier versions, and what says the same now.
RENAMED = {
    "parallel.exchange_parts": "parallel.exchange_chunks",
    "model.moe.triton_kernels": "runtime.kernels (triton or auto)",
}

# Last segment of a key as other trainers have it (lower case, underscores left out) -> the key here.
_SYNONYMS = {
    "optim.lr": "learningrate maxlr peaklr baselr stepsize",
    "optim.min_lr": "minlearningrate finallr endlr etamin minlrratio",
    "optim.warmup_steps": "warmup lrwarmupsteps warmupiters numwarmupsteps lrwarmupiters warmupratio",
    "optim.schedule": "scheduler lrscheduler lrschedulertype lrschedule lrdecaystyle",
    "optim.name": "optimizer optimizertype",
    "optim.weight_decay": "wd decay",
    "optim.grad_clip": "clip clipgrad clipgradnorm gradientclipping gradientclipval maxgradnorm gradclipnorm clipnorm",
    "optim.betas": "beta1 beta2 adambeta1 adambeta2 momentum",
    "optim.eps": "epsilon adameps adamepsilon",
    "train.steps": "maxsteps numsteps totalsteps trainsteps trainiters maxiters iterations iters numtrainsteps",
    "train.global_batch_size": "batchsize bs gbs batch trainbatchsize globalbatch totalbatchsize",
    "train.micro_batch_size": (
        "mbs perdevicebatchsize perdevicetrainbatchsize devicebatchsize microbatch localbatchsize "
        "trainmicrobatchsizepergpu accumulationsteps gradientaccumulationsteps gradaccum gradaccumsteps accumsteps"
    ),
    "train.precision": "dtype bf16 fp16 fp32 mixedprecision amp autocast",
    "train.recompute": "activationcheckpointing gradientcheckpointing recomputeactivations checkpointactivations",
    "train.eval_interval": "evalsteps evalevery valinterval evalfreq valcheckinterval validationinterval evalstrategy",
    "train.eval_batches": "evaliters valbatches limitvalbatches evalsamples",
    "train.log_interval": "logevery loggingsteps logfreq logsteps printfreq logeverynsteps",
    "checkpoint.interval": "saveinterval saveevery savesteps checkpointinterval ckptinterval savefreq saveiters",
    "checkpoint.keep": "savetotallimit keeplast maxcheckpoints savetopk keeplastn",
    "checkpoint.async": "asyncsave asynccheckpoint",
    "model.num_layers": "nlayers nlayer numhiddenlayers depth layers numblocks",
    "model.hidden_size": "dmodel dim nembd embeddim embeddingdim modeldim width hiddendim nembed",
    "model.num_heads": "nheads nhead numattentionheads heads",
    "model.num_kv_heads": "nkvheads numkeyvalueheads numquerygroups kvheads",
    "model.max_seq_len": "maxpositionembeddings maxseqlength blocksize contextlength nctx npositions maxlength",
    "model.vocab_size": "nvocab vocab vocabulary vocabularysize paddedvocabsize",
    "model.norm_eps": "rmsnormeps layernormeps layernormepsilon",
    "model.init_std": "initializerrange initstddev initmethodstd",
    "model.tie_embeddings": "tiewordembeddings weighttying tieweights",
    "model.rope_theta": "ropebase rotarybase theta",
    "model.moe.num_ffn_experts": "numexperts nexperts experts numlocalexperts nroutedexperts numroutedexperts",
    "model.moe.ffn_hidden_size": "dff intermediatesize ffndim ffnhidden moeintermediatesize expertdim ffnhiddendim",
    "model.moe.num_zero_experts": "zeroexperts nzeroexperts",
    "model.moe.num_copy_experts": "copyexperts ncopyexperts",
    "model.moe.num_constant_experts": "constantexperts nconstantexperts numconstexperts constexperts",
    "model.moe.top_k": "k topk numexpertspertok moetopk expertspertoken numselectedexperts moeroutertopk",
    "model.moe.capacity_factor": "capacity cf moeexpertcapacityfactor expertcapacityfactor",
    "model.moe.balance_loss_weight": (
        "auxlosscoef routerauxlosscoef auxlossweight moeauxlosscoeff loadbalanceloss balanceloss lossweight"
    ),
    "model.moe.z_loss_weight": "zloss zlosscoef routerzlosscoef moezlosscoeff",
    "parallel.expert": "ep epsize eps expertparallel expertparallelsize expertmodelparallelsize expertparalleldegree",
    "parallel.zero_stage": "zero stage zerooptimization",
    "parallel.timeout_seconds": "timeout ddptimeout nccltimeout",
    "parallel.heartbeat_seconds": "heartbeat heartbeattimeout heartbeatinterval",
    "runtime.device": "accelerator usecpu nocuda usecuda devicetype",
    "runtime.backend": "distbackend ddpbackend distributedbackend",
    "data.paths": "path datapath dataset datasets datapaths trainfile trainfiles traindata datadir files prefix",
    "data.seq_len": "seqlength sequencelength seqlen maxseqlen seqlens",
    "data.weights": "datasetweights mixture blend mixing",
    "data.tokenizer": "tokenizerpath tokenizerfile tokenizername tokenizermodel",
    "run.name": "runname expname experimentname jobname",
    "run.dir": "outputdir outdir output savedir logdir rundir workdir",
    "run.seed": "randomseed manualseed rngseed",
    "run.resume": "resumefrom resumefromcheckpoint load loadcheckpoint restore ckptpath",
    "init.path": "pretrained pretrainedpath checkpointpath modelnameorpath initfrom loadfrom",
    "logging.wandb.mode": "wandbmode reportto usewandb",
    "logging.wandb.project": "wandbproject projectname",
    "logging.progress": "progressbar disabletqdm tqdm",
}
_KEY_OF = {word: key for key, words in _SYNONYMS.items() for word in words.split()}


def nearest_keys(key: str, known: Sequence[str]) -> list[str]:
    """Return at most three of the ``known`` dotted keys that a mistyped one may mean, the likeliest first."""
    section, _, last = key.rpartition(".")
    word = _plain(last)
    same_word = [name for name in known if _plain(_last(name)) == word]  # in another section, or spelt otherwise
    meant = _KEY_OF.get(word) or _KEY_OF.get(_plain(key)) or _near_synonym(word)
    found = [*same_word, *(name for name in known if name == meant)]
    if not found:
        own = [_last(name) for name in known if _section(name) == section]
        found = [f"{section}.{name}" for name in difflib.get_close_matches(last, own, n=_SHOWN_KEYS, cutoff=0.5)]
        found = [name if section else name[1:] for name in found]
        if not own:
            found = difflib.get_close_matches(key, known, n=_SHOWN_KEYS, cutoff=0.6)
    if not found:
        words = difflib.get_close_matches(word, {_plain(_last(name)) for name in known}, n=1, cutoff=0.8)
        found = [name for name in known if words and _plain(_last(name)) == words[0]]
    found.sort(key=lambda name: _section(name) != section)
    return list(dict.fromkeys(found))[:_SHOWN_KEYS]


def unknown_key_message(key: str, known: Sequence[str]) -> str:
    """Return one line for a mistyped key, with the nearest known ones."""
    if key in RENAMED:
        return f"configuration key {key} is now {RENAMED[key]}; write that instead"
    own = [name for name in known if _section(key) and _section(name) == _section(key)]
    listed = own or known
    if near := nearest_keys(key, known):
        hint = f"did you mean {' or '.join(near)}?"
    elif len(listed) <= _LISTED_KEYS:
        hint = f"known keys: {', '.join(sorted(listed))}"
    else:
        hint = "`train.py --help` lists the known ones"
    return f"unknown configuration key {key}; {hint}"


def _near_synonym(word: str) -> str | None:
    close = difflib.get_close_matches(word, list(_KEY_OF), n=1, cutoff=0.88)
    return _KEY_OF[close[0]] if close else None


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _plain(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")
