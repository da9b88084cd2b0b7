"""What is decided of an answer that forks, streamed: in outputs that vLLM makes, as of a sequence of its own."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.output_processor import RequestState

from vllm_entropix.engine.carrier import TRACED
from vllm_entropix.records.fields import NUMBER_BYTES
from vllm_entropix.records.trace import TokenTrace

_STOPPED = "stop"


class DecidedStream:
    """Makes outputs of an answer's tokens as they are decided.

    Args:
        processor: the frontend's OutputProcessor.
        request: vLLM's EngineCoreRequest with the parameters of the client.
        prompt: its text.
        traced: does the client get records?
    """

    def __init__(self, processor: Any, request: Any, prompt: Any, traced: bool) -> None:
        self._state = RequestState.from_new_request(
            tokenizer=processor.tokenizer,
            request=request,
            prompt=prompt,
            parent_req=None,
            request_index=0,
            queue=None,
            log_stats=False,
            stream_interval=processor.stream_interval,
        )
        self._state.entropix_is_branch = True
        self._traced = traced

    @property
    def told(self) -> int:
        """Tokens that were handed over to vLLM, which may hold some text back."""
        return int(self._state.detokenizer.num_output_tokens())

    def go_on(self, branch: Any, tokens: int, cached: int) -> Any:
        """The output of what is decided since the last; None if there is none to send yet.

        Args:
            branch: vLLM's RequestState of a branch that has what is decided.
            tokens: of the answer that are decided.
            cached: tokens of the prompt that were in the prefix cache.
        """
        return self._output(branch, tokens, cached, None, None) if tokens > self.told else None

    def end(self, branch: Any, completion: Any, cached: int) -> Any:
        """The last output of an answer.

        Args:
            branch: vLLM's RequestState of the branch that is the answer.
            completion: its CompletionOutput, which tells why it ended.
            cached: tokens of the prompt that were in the prefix cache.
        """
        return self._output(branch, len(completion.token_ids), cached, completion.finish_reason, completion.stop_reason)

    def _output(self, branch: Any, tokens: int, cached: int, finish_reason: str | None, stop_reason: Any) -> Any:
        state, told = self._state, self.told
        state.stats, state.num_cached_tokens = branch.stats, cached
        new = branch.detokenizer.output_token_ids[told:tokens]
        # As vLLM's process_outputs does it: the text of a token that ends an answer isn't part of it, a stop string's is cut.
        by_token = finish_reason == _STOPPED and stop_reason not in getattr(state.detokenizer, "stop", ())
        state.detokenizer.update(new, by_token)
        traces: dict[int, TokenTrace] | None = getattr(branch, "entropix_traces", None)
        carried = None
        if self._traced and traces:
            records = traces[0][told:tokens].values()
            carried = {TRACED: [records.shape[1] * NUMBER_BYTES, records.tobytes()]}
        # vLLM asks only whether there is a reason, and what it is called.
        return state.make_request_output(new, None, finish_reason, stop_reason, carried)
