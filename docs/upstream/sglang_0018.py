"""Requests for experts that no reply carries are answered without a word."""

from sglang_engine import rows_of, run_to_end, start_engine, write_tokenizer

if __name__ == "__main__":
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    with start_engine(extra={"enable_return_routed_experts": False}) as engine:
        (reply,) = engine.replies([[3, 5, 7, 11]], {"max_new_tokens": 8})
        came = "routed_experts" in reply["meta_info"]
        print(f"an engine that was not started for experts is asked for them: no error, and they came: {came}")
    write_tokenizer(folder := engine.settings.model_path)
    with start_engine(folder, extra={"skip_tokenizer_init": False}) as engine:
        serving = OpenAIServingCompletion(engine._engine.tokenizer_manager, engine._engine.template_manager)
        wanted = {"max_tokens": 8, "ignore_eos": True, "return_routed_experts": True}
        request = CompletionRequest(model="m", prompt="t3 t5", n=2, **wanted)
        answer = run_to_end(serving.handle_request(request, None))
    rows = rows_of({"meta_info": {"routed_experts": answer.sglext.routed_experts}})
    print(f"/v1/completions: {len(answer.choices)} choices of 2 + 8 tokens, and the {len(rows)} rows of one of them")
