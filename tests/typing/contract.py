"""What type checkers say of an application. Read by mypy, never run: ``test_typing.py`` compares its findings with the
lines that end in ``# E: code``.
"""

from __future__ import annotations

from typing import Any, assert_type

from umbel import AsyncResult, Task, Umbel, shared_task

app = Umbel("shop")


# --- a plain function ---


@app.task
def add(x: int, y: int = 0) -> int:
    return x + y


assert_type(add(1, 2), int)
assert_type(add.delay(1), AsyncResult[int])
assert_type(add.delay(1, y=2).get(timeout=5), int)
assert_type(add.apply_async((1, 2), queue="mail", countdown=3.0).get(), int)
assert_type(add.map_delay([(1, 2), (3, 4)]), list[AsyncResult[int]])
add.delay("1")  # E: arg-type
add.delay(1, z=2)  # E: call-arg
add.delay()  # E: call-arg
add("1")  # E: arg-type
add.apply_async((1,), quee="mail")  # E: call-arg


# --- with options ---


@app.task(name="shop.total", queue="mail", max_retries=3, typed=True)
def total(prices: list[float]) -> float:
    return sum(prices)


assert_type(total.delay([1.0]), AsyncResult[float])
total.delay(["1"])  # E: list-item


@app.task(quee="mail")  # E: call-overload untyped-decorator
def misspelt() -> None: ...


# --- bound: the task itself is no argument of a call ---


@app.task(bind=True, max_retries=5)
def fetch(self: Task[..., Any], url: str) -> bytes:
    assert_type(self.request.retries, int)
    raise self.retry(countdown=1)


assert_type(fetch.delay("https://example.org").get(), bytes)
fetch.delay()  # E: call-arg
fetch.delay(fetch, "https://example.org")  # E: call-arg arg-type


@app.task(bind=False)
def unbound(x: int) -> int:
    return x


assert_type(unbound.delay(1), AsyncResult[int])


# --- async: the handle gives the value, a direct call the coroutine ---


@app.task
async def size(url: str) -> int:
    return len(url)


assert_type(size.delay("x"), AsyncResult[int])
size.delay(1)  # E: arg-type


@app.task(queue="mail")
async def size_with_options(url: str) -> int:
    return len(url)


@app.task(bind=True)
async def size_bound(self: Task[..., Any], url: str) -> int:
    return len(url)


assert_type(size_with_options.delay("x").get(), int)
assert_type(size_bound.delay("x").get(), int)


async def native() -> None:
    assert_type(await add.adelay(1), AsyncResult[int])
    assert_type(await add.delay(1), int)
    assert_type(await (await size.adelay("x")).aget(), int)
    assert_type(await size("x"), int)


# --- without an app ---


@shared_task
def shared(x: int) -> str:
    return str(x)


@shared_task(bind=True, queue="mail")
def shared_bound(self: Task[..., Any], x: int) -> str:
    return str(x)


@shared_task
async def shared_async(x: int) -> str:
    return str(x)


assert_type(shared.delay(1).get(), str)
assert_type(shared_bound.delay(1).get(), str)
assert_type(shared_async.delay(1).get(), str)
shared.delay("1")  # E: arg-type

# --- by name: nothing is known ---

assert_type(app.send_task("shop.tasks.add", (1, 2)), AsyncResult[Any])
