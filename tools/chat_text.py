"""A chat model's own answers to made-up requests, in its chat format: text to evaluate files on (bench_domains.py).

    python tools/chat_text.py MODEL OUT.txt

MODEL is a Hugging Face directory with a chat template. Requests are the same every time; answers are drawn at random,
on a GPU if there is one.
"""

import argparse
import itertools
import random
import sys
import time
from pathlib import Path

TOPICS = """
the water cycle; black holes; the Roman Empire; photosynthesis; bread baking; chess openings; volcanoes; coral reefs;
the printing press; jazz music; compound interest; the French Revolution; bees; electric cars; sleep; the Moon landing;
tea; vaccines; mountain climbing; the Silk Road; renewable energy; learning a language; gardening in a small flat;
the human heart; poetry; public libraries; earthquakes; the Great Wall of China; running a marathon; time zones;
dinosaurs; democracy; microscopes; saving money; rainforests; the Olympic Games; friendship; computer networks;
glass making; migrating birds; the piano; antibiotics; the Industrial Revolution; good manners; maps; desert animals;
recycling; the stock market; fairy tales; prime numbers; the ocean floor; bicycles; ancient Egypt; the five senses;
writing a diary; trains; climate change; cooking rice; satellites; honesty
"""
REQUESTS = """
What is {}?
Explain {} to a ten-year-old.
Write a short story about {}.
Give me five interesting facts about {}.
Why does {} matter?
Write a short poem about {}.
I have to give a talk about {}. Can you suggest an outline?
What are common mistakes people make when they think about {}?
Summarize what is known about {} in three sentences.
Write an email to a friend in which you tell them about {}.
How would you explain {} to someone who has never heard of it?
What questions should I ask an expert on {}?
Compare {} with something from everyday life.
List the advantages and disadvantages of {}.
Write a dialogue between a teacher and a student about {}.
"""
OTHERS = """
Write a Python function that reverses a string.
Write a Python function that returns the n-th Fibonacci number.
How do I read a CSV file in Python?
Write a SQL query that counts the orders of each customer.
What is 17 times 24? Show your steps.
A train travels 180 km in 2 hours. What is its average speed?
Translate into French: The weather is nice today.
Correct the grammar: She don't has no time for reading books yesterday.
Write a JavaScript function that removes duplicates from an array.
Rewrite this sentence in a formal tone: Hey, can you send me that file real quick?
Write a haiku about winter.
Who wrote Romeo and Juliet?
What is the capital of Australia?
Give me a recipe for vegetable soup.
Plan a weekend in Rome.
Write a C function that computes the length of a string.
Explain what a hash table is.
What does the word ephemeral mean?
Make up a name and a slogan for a shop that sells umbrellas.
I feel stressed at work. What can I do?
"""


def requests(count: int, seed: int) -> list[str]:
    """At most 920, without repetitions."""
    topics = [topic.strip() for topic in TOPICS.split(";")]
    mixed = [text.format(topic) for text, topic in itertools.product(REQUESTS.strip().splitlines(), topics)]
    random.Random(seed).shuffle(mixed)
    chosen = [*OTHERS.strip().splitlines(), *mixed][:count]
    random.Random(seed).shuffle(chosen)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=200, help="of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = time.monotonic()
    torch.manual_seed(args.seed)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.chat_template is None:
        sys.exit(f"{args.model} has no chat template")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    end = tokenizer.eos_token_id
    heads = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in requests(args.requests, args.seed)
    ]
    texts = []
    for first in range(0, len(heads), args.batch):
        part = heads[first : first + args.batch]
        inputs = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.inference_mode():
            found = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=args.temperature,
                top_k=0,
                max_new_tokens=args.tokens,
                eos_token_id=end,
                pad_token_id=end,
            )
        for head, row in zip(part, found[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answer = row[: row.index(end)] if end in row else row
            texts.append(f"{head}{tokenizer.decode(answer)}{tokenizer.eos_token}\n")
    args.out.write_text("".join(texts), encoding="utf-8")
    print(f"{len(texts)} answers, {sum(map(len, texts)) / 1000:.0f} kB, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
