from hive import log, model

CHARACTERS_MAX = 4_000


def run(input: dict) -> dict:
    answer = model.chat(
        [
            {"role": "system", "content": "Say in one short sentence what the text is about."},
            {"role": "user", "content": input["text"][:CHARACTERS_MAX]},
        ],
        temperature=0,
        seed=1,
    )
    log.info("%s: %d tokens", answer["model"], answer["usage"]["completion_tokens"])
    return {"summary": answer.text.strip(), "tokens": answer["usage"]["completion_tokens"]}
