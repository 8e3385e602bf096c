"""What the endpoints take and give: OpenAI's fields as far as this server has them, and ours.

Requests are checked strictly (true is no 1, "1" is no 1, NaN is no number). Unknown fields are ignored, as clients
send many; a known one that would change the answer but is not supported is refused. The models of answers are for
the OpenAPI document and the tests: what is sent is written by wire.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_CHOICES = 64  # answers of one request
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_TOP_LOGPROBS = 20
UNSUPPORTED = (  # only the value that does nothing is taken
    *("presence_penalty", "frequency_penalty", "logit_bias", "tools", "functions", "response_format"),
    *("echo", "suffix", "best_of"),
)


def _is_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair stands at character {error.start}; it is no text") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Zero = Annotated[float, Field(ge=0, le=0, description="not supported: 0 only")]
Empty = Annotated[dict[str, Any], Field(max_length=0, description="not supported: empty only")]
Nothing = Annotated[list[Any], Field(max_length=0, description="not supported: empty only")]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class Part(Strict):
    """A piece of a message. A tool call and its output are an assistant's."""

    type: Literal["text", "python", "python_output"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    parts: list[Part] | None = Field(None, description="as this server's answers have it; counts before content")


class StreamOptions(Strict):
    include_usage: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text"]


class GenerationRequest(Strict):
    """What /v1/chat/completions and /v1/completions share. Where it says nothing, the server's settings hold."""

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = Field(None, description="0 = off")
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = Field(None, description="null = another each time")
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Empty | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = Field(
        None, description="max_tokens' new name"
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    response_format: ResponseFormat | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """`prompt` is raw text behind <|bos|>, or token ids as they are."""

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Literal[False] | None = Field(None, description="not supported: false only")
    suffix: Annotated[Text, Field(max_length=0)] | None = Field(None, description="not supported: empty only")
    best_of: Annotated[int, Field(ge=1, le=1)] | None = Field(None, description="not supported: 1 only")

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class PlainMessage(BaseModel):
    role: str
    content: str


class PlainRequest(BaseModel):
    """The reference's /chat/completions."""

    messages: list[PlainMessage]
    temperature: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None


# ---- answers ----------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class PlainError(BaseModel):
    detail: str | list[dict[str, Any]]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    parts: list[Part]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    dropped_messages: int = Field(0, description="the oldest messages that did not fit into the context")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context: int = Field(description="tokens of prompt and answer together")
    source: str = Field(description="the stage that trained it")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "shutting down", "no engine"]
    ready: bool
    num_gpus: int
    available_workers: int


class WorkerStats(BaseModel):
    gpu_id: int
    device: str


class Stats(BaseModel):
    """The reference's four first."""

    total_workers: int
    available_workers: int
    busy_workers: int
    workers: list[WorkerStats]
    running: int = Field(description="answers that an engine has, waiting for their first token or being written")
    waiting: int = Field(description="answers that no engine has yet")
    open_requests: int = Field(description="requests whose answer is not wholly sent")
    engines: list[dict[str, int]]
