from llmtrain.observe.phases import START_UP, Phases


def test_a_run_begins_with_its_start_up() -> None:
    phases = Phases()
    assert phases.starting and phases.current == (START_UP, 0.0)
    with phases("data"):
        assert phases.starting


def test_a_phase_has_a_name_and_a_beginning() -> None:
    phases = Phases()
    phases.now = 3.0
    with phases("data"):
        phases.now = 5.0
        assert phases.current == ("data", 3.0)
    phases.begin_training(3, 10)
    assert phases.current == ("training", 5.0)
    assert (phases.step, phases.num_steps, phases.starting) == (3, 10, False)


def test_the_time_of_an_inner_phase_is_not_the_outer_ones() -> None:
    """A rollout inside the fetching of a batch has a deadline of its own."""
    phases = Phases()
    with phases("data"):
        phases.now = 2.0
        with phases("rollout"):
            phases.now = 902.0
        assert phases.current == ("data", 900.0)  # it has lasted two seconds


def test_an_error_leaves_the_phase() -> None:
    phases = Phases()
    phases.begin_training(3, 10)
    try:
        with phases("update"):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert phases.current[0] == "training"
