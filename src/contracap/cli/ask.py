"""The command that answers questions about an image."""

from typing import Annotated

from contracap.cli.flags import PathText, arg
from contracap.cli.messages import interruption
from contracap.cli.options import Model, ModelFlags, WeightsName


@interruption("interrupted: only the answers above were computed; run the command again to start over")
def ask(
    weights: WeightsName,
    image: Annotated[PathText, arg(metavar="IMAGE", help="An image or its URL.")],
    questions: Annotated[tuple[str, ...], arg(metavar="QUESTION [QUESTION ...]", help="Questions about the image.")],
    /,
    *,
    answers: Annotated[
        tuple[str, ...], arg(metavar="ANSWER [ANSWER ...]", help="Answers to choose from; by default the model writes.")
    ] = (),
    prompt: Annotated[
        str | None,
        arg(metavar="TEXT", help="Text before an answer, with {} where the question goes, as in training."),
    ] = None,
    model_flags: Model = ModelFlags(),
) -> None:
    """Answer questions about an image, and print a line for each: the answer and its probability.

    For a model that was trained on questions. Of `--answers`, the probability is the share among them.
    """
    from contracap.evaluation.answers import AnswerChooser
    from contracap.evaluation.vqa import ANSWER_WRITER, PROMPT, ask_about, check_prompt

    if not questions or not all(question.strip() for question in questions):
        raise ValueError("give one or more questions, none of them empty: contracap ask WEIGHTS IMAGE QUESTION")
    answerer = AnswerChooser(answers) if answers else ANSWER_WRITER
    wanted = PROMPT if prompt is None else prompt
    check_prompt(wanted)
    model, processor = model_flags.load(weights)
    for found in ask_about(model, processor, image, questions, answerer=answerer, prompt=wanted):
        print(f"{found.text}\t{found.probability:.4f}")
