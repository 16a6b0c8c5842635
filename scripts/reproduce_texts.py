"""What each page of results says before its tables."""

import math

METHODS = """\
DiffusionOPD (arXiv:2605.15055) says that distilling several teachers along the student's own trajectory beats joint
and cascade reinforcement learning, averaging the teachers' weights, supervised training on their samples and
distillation at states that are not the student's, at less cost once the teachers are there. Every method here has the
same adapter, the same seconds of training on one core, a constant learning rate, and is deployed in 4 steps without
guidance. Distillation, off-policy too, begins at the teachers' average, "from the base" at the base; reinforcement
learning and SFT begin at the base. Network calls are rows of the denoiser, forward, of all sides (a backward is not
counted).

What is against reinforcement learning here: the seconds are a small part of what it needs (`5-rewards.md`); text is
scored right or wrong, not by the share of right letters that teaches the text teacher; each task of the cascade begins
its learning rate's five updates of warm-up again. NFT makes two optimizer steps an update, GRPO-Guard one.
"""
RANGES = """
{seeds}{prompts} prompts leave {half:.2f} either way
at a score of .5 and {top:.2f} at .95.{apart}
"""
SEEDS = "In parentheses after a score: the lowest and the highest seed. Beyond that "
APART = " After a difference, paired by prompt: 95 %, over what is asked and seeds."
GRADIENT = """\
DiffusionOPD (arXiv:2605.15055) minimises the KL of each step in closed form. Policy gradients see the same KL through
drawn next states: the estimate has the same mean, and what it adds is variance only.

Measured on the embedded world: a fresh adapter of rank 32 on the base, each of the three teachers under its own
guidance, a walk of {steps} DDIM steps with eta = .7 on both sides, {pictures} prompts a teacher, {draws} draws at
each state. The variance of a one-picture gradient is the trace of its covariance over prompts and noise; the ratio is
that of the estimate over that of the closed form. "With baseline" takes the KL itself off the log ratio: the best
that a baseline which knows the state alone can be. Curves: {updates} updates of {batch} pictures, teachers in turn, 4
steps, the recipe's rate, one draw a state for the estimates.
"""
CHOICES = """\
One change of `together.toml` at a time (but that one state of 4 was also tried at half the rate, beside all 4), the
same seconds of training. DiffusionOPD found deterministic rollouts up to five times as efficient as a = .7; D-OPSD
weighs by the denoised picture; DanceOPD supervises one state. The learning rate is constant here (the recipe's falls).
"""
SOLVERS = """\
A student that matches a teacher's prediction at every state it visits (m = 1) is that teacher walked in the student's
steps by the student's solver. So what a solver makes of the teacher in 4 steps bounds what m = 1 can reach with it.
Nothing is trained here.
"""
REWARDS = """\
From the base, by the world's scorer alone (text by the share of right letters): DiffusionNFT (2509.16117), Flow-GRPO
(2505.05470; "GRPO" below), GRPO-Guard (2510.22319), with the settings of `teachers/*/nft.toml` and `grpo.toml`. Sampled
without guidance in 8 steps; scored as the card deploys the teacher. `grpo.toml` learns from an update's 64 pictures in
one optimizer step, so that the ratio is 1 and neither clip nor bias correction acts, and has a KL to the base. GRPO and
GRPO-Guard then differ in how much each step of the walk counts, and so in how much the KL weighs beside it. "2 steps,
no KL" is as NFT has it: two optimizer steps of an update at the same rate, by which ratio and clip act, and no KL. A
training fell where its last 10 updates' reward is clearly below that of its first 10 (`diffopd teach` warns of it). The
columns of a first training are its scores on tasks that it was not taught, on 50 prompts each. The curves are of what
draws the pictures to learn from: GRPO's of its live weights, NFT's of its old policy, an average that is behind them.
What is scored and drawn is the moving average in either. No rate was swept.
"""
STEPS_OR_KL = """\
As `5-rewards.md`, and the same trainings where they have a name there: its GRPO differs from its "2 steps, no KL" in
two things, here each is changed alone as well. Two steps of an update are of half its pictures each, at the same rate,
so the moving average, which is what is scored, is over half as many updates. Without the KL an update is cheaper, so
more fit into the same seconds.
"""
TUNING = """\
D-OPSD (arXiv:2605.05204) says that a step-distilled model learns new pictures on its own walk, taught by itself with
the picture in view, without losing its few steps or what it knew; fine-tuning it in the ordinary way makes its few-step
pictures mush. Measured on the embedded world's `emoji-4-steps`: the untouched model and what came of each training,
drawn in its 4 steps from prompts that are not in the set, three noises each (and in 50 steps, one training of a method,
20 held-out prompts a task). *subject*: share of drawings that are nearest to what the set teaches and explained by it
to .7 of its energy; *subject_shown* and *subject_new*: of things that the pictures show and that they do not;
*subject_close*: explained to .88, which a blur of 1.5 pixels is not;
*composition*, *text*, *style*: mean score on 100 held-out prompts of each of the world's tasks, *kept* their share of
the untouched model's, *sharpness* of those drawings likewise, *subject_sharpness* of the set's own prompts'. 95 %
intervals over what is asked and trainings. The settings were found on the set "manner" (`docs/tune.md`); what is
reported here are other held-out prompts of the three tasks and other noise. D-OPSD and DreamBooth keep 160 prompts of
those tasks unless said otherwise; none of them is among the held-out ones.
"""
TUNING_2 = """\
As `4-tuning.md`, where few steps are harder to keep: on `emoji-2-steps`. In 4 steps the world's base with its guidance
draws as much as in 20, in 2 it draws three quarters of it (`scripts/check_unseen.py --pipeline
pipelines/emoji-2-steps --steps 2`), so a fine-tuning that loses what the step distillation gave can be seen to. All
are drawn in 20 steps as well, on 60 held-out prompts a task: what a model draws there and not in 2 is lost few steps,
what it draws in neither is forgotten. Settings and columns as there; D-OPSD supervises the last of the
two states.
"""
SETS = {
    "manner": "30 pictures in a manner that no training has seen (Fluent 3D). The teacher sees them by an IP-Adapter.",
    "manner, 2 steps": "30 pictures in a manner that no training has seen (Fluent 3D); the model has 2 steps.",
    "word": "30 pictures in a manner that it knows, under a new word. The teacher is told the known word (no picture).",
    "object": "20 pictures of an octopus, alone and beside things. Its IP-Adapter draws no octopus but a blob.",
}


def ranges(prompts: int, seeds: int, *, differences: bool) -> str:
    """How far scores of `prompts` held-out prompts a task can be trusted, and what the parentheses after them are."""
    half, top = (1.96 * math.sqrt(score * (1 - score) / prompts) for score in (0.5, 0.95))
    return RANGES.format(
        prompts=prompts, half=half, top=top, seeds=SEEDS if seeds > 1 else "", apart=APART if differences else ""
    )
