"""Rounds of one job as tables: what happens on the left, what follows from it on the right.

A line reads `<time> <event> => <effects> | <job> <round>.<generation> <phase>`. Pipelines are
words whose letters are their nodes, in chain order: `ab` is a pipeline that a leads.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from coordinator.placement import Member, PipelinePlan
from coordinator.round_events import (
    Abandoned,
    AggregateDone,
    Change,
    CommitNow,
    Contribution,
    Event,
    NextRound,
    NodeLost,
    Offer,
    Pause,
    Resume,
    Rewind,
    Scored,
    Stop,
    Tick,
    Unusable,
)
from coordinator.round_model import (
    Aggregate,
    Commit,
    ContributionHeld,
    Effect,
    FormPipelines,
    JobChanged,
    OpenNext,
    PipelineLost,
    PipelinesFormed,
    Reply,
    Rewound,
    RoundAggregated,
    RoundCommitted,
    RoundFrozen,
    RoundOpened,
    RoundReopened,
    RoundScored,
    RoundsState,
    Rules,
    ScoringBegun,
    Settings,
    SettingsAdopted,
    SettingsStored,
    WrapUp,
)
from coordinator.rounds import advance, begin, recover
from swarm.ids import Span

SCENARIOS = {
    "two rounds, everybody in time": """
        0 begin             => opened 1, form | waiting 1.0 open
        0 offer ab cd       => formed ab:0 cd:1, job running | running 1.1 open
        5 send a to 0       => held a, reply held | running 1.1 open
        6 send c to 1       => held c, reply held | running 1.1 open
        7 send b to 0       => held b whole, reply held | running 1.1 open
        8 send d to 1       => held d whole, reply held, freeze 0+1, aggregate | running 1.1 frozen
        9 aggregated        => aggregated, commit | running 1.1 aggregated
        9 commit            => committed 0+1, open 2 | running 1.1 committed
        9 next ab cd        => opened 2, formed ab:0 cd:1, job running | running 2.1 open
        10 send a to 0      => held a, reply held | running 2.1 open
        10 send b to 0      => held b whole, reply held | running 2.1 open
        10 send c to 1      => held c, reply held | running 2.1 open
        10 send d to 1      => held d whole, reply held, freeze 0+1, aggregate | running 2.1 frozen
        11 aggregated       => aggregated, commit | running 2.1 aggregated
        11 commit           => committed 0+1, job finished | finished 2.1 committed
        12 next ab          => - | finished 2.1 committed
        12 send a to 0 in 3 => reply rejected | finished 2.1 committed
    """,
    "the deadline freezes what is whole, the rest is late": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer ab cd   => formed ab:0 cd:1, job running | running 1.1 open
        5 send a to 0   => held a, reply held | running 1.1 open
        5 send b to 0   => held b whole, reply held | running 1.1 open
        6 send c to 1   => held c, reply held | running 1.1 open
        79 tick         => - | running 1.1 open
        80 tick         => wrap up | running 1.1 open
        99 tick         => - | running 1.1 open
        100 tick        => freeze 0 late 1, aggregate | running 1.1 frozen
        101 send d to 1 => reply late | running 1.1 frozen
        101 send c to 1 => reply duplicate | running 1.1 frozen
        102 aggregated  => aggregated, commit | running 1.1 aggregated
        102 commit      => committed 0, open 2 | running 1.1 committed
        103 send d to 1 => reply late | running 1.1 committed
    """,
    "rounds that overlap: a pipeline of the same nodes goes on, in the last round nobody trains ahead": """
        0 begin overlap   => opened 1, form | waiting 1.0 open
        0 offer ab cd     => formed ab:0 cd:1 ahead, job running | running 1.1 open
        5 send a to 0     => held a, reply held | running 1.1 open
        5 send b to 0     => held b whole, reply held | running 1.1 open
        6 send c to 1     => held c, reply held | running 1.1 open
        7 send d to 1     => held d whole, reply held, freeze 0+1, aggregate | running 1.1 frozen
        8 aggregated      => aggregated, commit | running 1.1 aggregated
        8 commit          => committed 0+1, open 2 | running 1.1 committed
        9 next cd ab      => opened 2, formed cd:0 from 1 ab:1 from 0, job running | running 2.1 open
    """,
    "who was late or lost, or has other neighbours now, starts anew": """
        0 begin overlap    => opened 1, form | waiting 1.0 open
        0 offer ab cd ef   => formed ab:0 cd:1 ef:2 ahead, job running | running 1.1 open
        2 lost e again gf  => lost 2, formed gf:3 again ahead | running 1.2 open
        5 send a to 0      => held a, reply held | running 1.2 open
        5 send b to 0      => held b whole, reply held | running 1.2 open
        5 send g to 3      => held g, reply held | running 1.2 open
        5 send f to 3      => held f whole, reply held | running 1.2 open
        100 tick           => freeze 0+3 late 1, aggregate | running 1.2 frozen
        101 aggregated     => aggregated, commit | running 1.2 aggregated
        102 commit         => committed 0+3, open 2 | running 1.2 committed
        102 next cd ba gf  => opened 2, formed cd:0 ba:1 gf:2 from 3, job running | running 2.1 open
    """,
    "after a pause nobody goes on from what it had trained ahead": """
        0 begin overlap => opened 1, form | waiting 1.0 open
        0 offer ab      => formed ab:0 ahead, job running | running 1.1 open
        5 send a to 0   => held a, reply held | running 1.1 open
        5 send b to 0   => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 pause         => job running | running 1.1 frozen
        8 aggregated    => aggregated, commit | running 1.1 aggregated
        8 commit        => committed 0, job paused | paused 1.1 committed
        9 resume        => job waiting, open 2 | waiting 1.1 committed
        9 next ab       => opened 2, formed ab:0, job running | running 2.1 open
    """,
    "a lost pipeline does not hold up the others": """
        0 begin                       => opened 1, form | waiting 1.0 open
        0 offer ab cd                 => formed ab:0 cd:1, job running | running 1.1 open
        5 send a to 0                 => held a, reply held | running 1.1 open
        5 send b to 0                 => held b whole, reply held | running 1.1 open
        7 send c to 1                 => held c, reply held | running 1.1 open
        8 lost c                      => - | running 1.1 open
        9 lost d                      => lost 1, freeze 0, aggregate | running 1.1 frozen
        9 send d to 1                 => reply late | running 1.1 frozen
    """,
    "nobody whole by the deadline: the same round in another generation": """
        0 begin               => opened 1, form | waiting 1.0 open
        0 offer ab            => formed ab:0, job running | running 1.1 open
        1 send a to 0         => held a, reply held | running 1.1 open
        100 tick              => lost 0, job waiting, form | waiting 1.1 open
        101 send b to 0       => reply late | waiting 1.1 open
        101 offer -           => job waiting | waiting 1.1 open
        101 offer -           => - | waiting 1.1 open
        102 offer ac          => formed ac:1, job running | running 1.2 open
        103 send a to 0       => reply duplicate | running 1.2 open
        103 send a to 1 gen 1 => reply rejected | running 1.2 open
        104 send a to 1       => held a, reply held | running 1.2 open
        105 send b to 0       => reply late | running 1.2 open
        106 send c to 1       => held c whole, reply held, freeze 1, aggregate | running 1.2 frozen
    """,
    "three attempts without one contribution pause the job": """
        0 begin       => opened 1, form | waiting 1.0 open
        0 offer ab    => formed ab:0, job running | running 1.1 open
        3 abandon 0   => lost 0, job waiting, form | waiting 1.1 open
        3 offer ab    => formed ab:1, job running | running 1.2 open
        5 lost a      => lost 1, job waiting, form | waiting 1.2 open
        6 offer ab    => formed ab:2, job running | running 1.3 open
        105 tick      => wrap up | running 1.3 open
        106 tick      => lost 2, job paused | paused 1.3 open
        107 offer ab  => - | paused 1.3 open
        108 resume    => job waiting, form | waiting 1.3 open
        108 offer ab  => formed ab:3, job running | running 1.4 open
    """,
    "a contribution in between starts the count anew": """
        0 begin       => opened 1, form | waiting 1.0 open
        0 offer ab    => formed ab:0, job running | running 1.1 open
        1 abandon 0   => lost 0, job waiting, form | waiting 1.1 open
        1 offer ab    => formed ab:1, job running | running 1.2 open
        2 abandon 1   => lost 1, job waiting, form | waiting 1.2 open
        2 offer ab    => formed ab:2, job running | running 1.3 open
        3 send b to 2 => held b, job running, reply held | running 1.3 open
        4 abandon 2   => lost 2, job waiting, form | waiting 1.3 open
        5 offer ab    => formed ab:3, job running | running 1.4 open
        6 abandon 3   => lost 3, job waiting, form | waiting 1.4 open
    """,
    "the same payload again, and another one": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer ab      => formed ab:0, job running | running 1.1 open
        1 send a to 0   => held a, reply held | running 1.1 open
        2 send a to 0   => reply duplicate | running 1.1 open
        3 send a! to 0  => reply conflict | running 1.1 open
        4 send z to 0   => reply rejected | running 1.1 open
        4 send b to 9   => reply rejected | running 1.1 open
        5 send b to 0   => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 send b to 0   => reply duplicate | running 1.1 frozen
        6 send b! to 0  => reply conflict | running 1.1 frozen
        7 abandon 0     => - | running 1.1 frozen
        7 lost a        => - | running 1.1 frozen
    """,
    "a restart goes on where it was": """
        0 begin        => opened 1, form | waiting 1.0 open
        1 restart      => form | waiting 1.0 open
        2 offer ab     => formed ab:0, job running | running 1.1 open
        3 send a to 0  => held a, reply held | running 1.1 open
        90 restart     => - | running 1.1 open
        150 tick       => - | running 1.1 open
        175 tick       => wrap up | running 1.1 open
        176 restart    => - | running 1.1 open
        190 tick       => - | running 1.1 open
        195 send b to 0 => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
        196 restart    => aggregate | running 1.1 frozen
        162 aggregated => aggregated, commit | running 1.1 aggregated
        162 aggregated => - | running 1.1 aggregated
        163 restart    => commit | running 1.1 aggregated
        164 commit     => committed 0, open 2 | running 1.1 committed
        164 commit     => - | running 1.1 committed
        165 restart    => open 2 | running 1.1 committed
        166 next -     => opened 2, job waiting | waiting 2.0 open
        167 restart    => form | waiting 2.0 open
        168 offer a    => formed a:0, job running | running 2.1 open
    """,
    "a quorum whole: the rest is asked to end, and has a grace": """
        0 begin quorum  => opened 1, form | waiting 1.0 open
        0 offer a b c d => formed a:0 b:1 c:2 d:3, job running | running 1.1 open
        20 send a to 0  => held a whole, reply held | running 1.1 open
        21 send b to 1  => held b whole, reply held | running 1.1 open
        22 send c to 2  => held c whole, wrap up, reply held | running 1.1 open
        26 tick         => - | running 1.1 open
        27 tick         => freeze 0+1+2 late 3, aggregate | running 1.1 frozen
        28 send d to 3  => reply late | running 1.1 frozen
    """,
    "a quorum whole: who makes it within the grace counts": """
        0 begin quorum  => opened 1, form | waiting 1.0 open
        0 offer a b c d => formed a:0 b:1 c:2 d:3, job running | running 1.1 open
        20 send a to 0  => held a whole, reply held | running 1.1 open
        21 send b to 1  => held b whole, reply held | running 1.1 open
        22 send c to 2  => held c whole, wrap up, reply held | running 1.1 open
        23 restart      => - | running 1.1 open
        27 tick         => - | running 1.1 open
        27 send d to 3  => held d whole, reply held, freeze 0+1+2+3, aggregate | running 1.1 frozen
    """,
    "lost pipelines do not make a quorum easier": """
        0 begin quorum  => opened 1, form | waiting 1.0 open
        0 offer a b c d => formed a:0 b:1 c:2 d:3, job running | running 1.1 open
        5 lost a        => lost 0 | running 1.1 open
        20 send b to 1  => held b whole, reply held | running 1.1 open
        21 send c to 2  => held c whole, reply held | running 1.1 open
        22 send d to 3  => held d whole, reply held, freeze 1+2+3, aggregate | running 1.1 frozen
    """,
    "an automatic deadline is three times what pipelines took, and doubles": """
        0 begin auto    => opened 1, form | waiting 1.0 open
        0 offer ab      => formed ab:0, job running | running 1.1 open
        100 send a to 0 => held a, reply held | running 1.1 open
        100 send b to 0 => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
        100 aggregated  => aggregated, commit | running 1.1 aggregated
        100 commit      => committed 0, open 2 | running 1.1 committed
        100 next ab     => opened 2, formed ab:0, job running | running 2.1 open
        340 tick        => wrap up | running 2.1 open
        399 tick        => - | running 2.1 open
        400 tick        => lost 0, job waiting, form | waiting 2.1 open
        400 offer ab    => formed ab:1, job running | running 2.2 open
        879 tick        => - | running 2.2 open
        880 tick        => wrap up | running 2.2 open
        1000 tick       => lost 1, job waiting, form | waiting 2.2 open
    """,
    "a lost stage is replaced while there is time": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab cd          => formed ab:0 cd:1, job running | running 1.1 open
        5 send c to 1          => held c, reply held | running 1.1 open
        10 lost d spare ce     => lost 1, formed ce:2 again | running 1.2 open
        11 send c to 1 gen 1   => reply duplicate | running 1.2 open
        12 restart             => - | running 1.2 open
        20 send a to 0         => held a, reply held | running 1.2 open
        20 send b to 0         => held b whole, reply held | running 1.2 open
        30 send c to 2         => held c, reply held | running 1.2 open
        30 send e to 2         => held e whole, reply held, freeze 0+2, aggregate | running 1.2 frozen
    """,
    "a whole pipeline waits for one that is replaced": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab cd          => formed ab:0 cd:1, job running | running 1.1 open
        20 send a to 0         => held a, reply held | running 1.1 open
        20 send b to 0         => held b whole, reply held | running 1.1 open
        49 abandon 1 spare ce  => lost 1, formed ce:2 again | running 1.2 open
        80 tick                => wrap up | running 1.2 open
        100 tick               => freeze 0 late 2, aggregate | running 1.2 frozen
    """,
    "in the second half of a round what is lost is left out": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab cd          => formed ab:0 cd:1, job running | running 1.1 open
        50 lost d spare ce     => lost 1 | running 1.1 open
        60 send a to 0         => held a, reply held | running 1.1 open
        60 send b to 0         => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
    """,
    "without a spare node what is lost is left out": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab cd          => formed ab:0 cd:1, job running | running 1.1 open
        1 lost d               => lost 1 | running 1.1 open
    """,
    "who was taken meanwhile is no spare": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab cd          => formed ab:0 cd:1, job running | running 1.1 open
        1 lost d spare cb      => lost 1 | running 1.1 open
    """,
    "with every pipeline lost the round is formed anew": """
        0 begin                => opened 1, form | waiting 1.0 open
        0 offer ab             => formed ab:0, job running | running 1.1 open
        1 lost b spare ac      => lost 0, job waiting, form | waiting 1.1 open
        1 offer ac             => formed ac:1, job running | running 1.2 open
    """,
    "three repairs of a round are enough, and a quorum is of the first forming": """
        0 begin quorum         => opened 1, form | waiting 1.0 open
        0 offer a b c de       => formed a:0 b:1 c:2 de:3, job running | running 1.1 open
        1 lost e spare df      => lost 3, formed df:4 again | running 1.2 open
        2 lost f spare dg      => lost 4, formed dg:5 again | running 1.3 open
        3 lost g spare dh      => lost 5, formed dh:6 again | running 1.4 open
        4 lost h spare di      => lost 6 | running 1.4 open
        20 send a to 0         => held a whole, reply held | running 1.4 open
        20 send b to 1         => held b whole, reply held | running 1.4 open
        20 send c to 2         => held c whole, reply held, freeze 0+1+2, aggregate | running 1.4 frozen
    """,
    "a committed round is scored before the next one opens": """
        0 begin scored   => opened 1, form | waiting 1.0 open
        0 offer a b      => formed a:0 b:1, job running | running 1.1 open
        5 send a to 0    => held a whole, reply held | running 1.1 open
        6 send b to 1    => held b whole, reply held, freeze 0+1, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit         => committed 0+1, 0 scores | running 1.1 committed
        7 next a b       => - | running 1.1 committed
        8 restart        => - | running 1.1 committed
        9 score 2.0      => scored 2.0 best 1, open 2 | running 1.1 committed
        9 score 1.0      => - | running 1.1 committed
        10 next a b      => opened 2, formed a:0 b:1, job running | running 2.1 open
        15 send a to 0   => held a whole, reply held | running 2.1 open
        16 send b to 1   => held b whole, reply held, freeze 0+1, aggregate | running 2.1 frozen
        16 aggregated    => aggregated, commit | running 2.1 aggregated
        16 commit        => committed 0+1, 0 scores | running 2.1 committed
        17 score 2.5     => scored 2.5 best 1, job finished | finished 2.1 committed
    """,
    "who was asked for a score is lost: the next pipeline is asked, then nobody": """
        0 begin scored   => opened 1, form | waiting 1.0 open
        0 offer a b      => formed a:0 b:1, job running | running 1.1 open
        5 send a to 0    => held a whole, reply held | running 1.1 open
        6 send b to 1    => held b whole, reply held, freeze 0+1, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit         => committed 0+1, 0 scores | running 1.1 committed
        7 lost b         => - | running 1.1 committed
        8 abandon 0      => 1 scores | running 1.1 committed
        107 tick         => - | running 1.1 committed
        108 tick         => not scored, open 2 | running 1.1 committed
    """,
    "who has left is not asked for a score": """
        0 begin scored   => opened 1, form | waiting 1.0 open
        0 offer ab c d e => formed ab:0 c:1 d:2 e:3, job running | running 1.1 open
        5 send a to 0    => held a, reply held | running 1.1 open
        5 send b to 0    => held b whole, reply held | running 1.1 open
        5 send c to 1    => held c whole, reply held | running 1.1 open
        5 send d to 2    => held d whole, reply held | running 1.1 open
        5 lost b         => - | running 1.1 open
        6 send e to 3    => held e whole, reply held, freeze 0+1+2+3, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit without b    => committed 0+1+2+3, 1 scores | running 1.1 committed
        7 lost d without bd   => - | running 1.1 committed
        8 lost c without bcd  => 3 scores | running 1.1 committed
        108 tick without bcd  => not scored, open 2 | running 1.1 committed
    """,
    "nobody is left to be asked for a score": """
        0 begin scored   => opened 1, form | waiting 1.0 open
        0 offer ab       => formed ab:0, job running | running 1.1 open
        5 send a to 0    => held a, reply held | running 1.1 open
        5 send b to 0    => held b whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit without a  => committed 0, not scored, open 2 | running 1.1 committed
        7 next -         => opened 2, job waiting | waiting 2.0 open
    """,
    "a pause does not wait for a score": """
        0 begin scored   => opened 1, form | waiting 1.0 open
        0 offer a        => formed a:0, job running | running 1.1 open
        6 send a to 0    => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit         => committed 0, 0 scores | running 1.1 committed
        7 pause          => not scored, job paused | paused 1.1 committed
        8 score 2.0      => - | paused 1.1 committed
        8 resume         => job waiting, open 2 | waiting 1.1 committed
    """,
    "no better score for long enough ends the job": """
        0 begin scored patience => opened 1, form | waiting 1.0 open
        0 rounds 9       => settings stored, settings adopted, form | waiting 1.0 open
        0 offer a        => formed a:0, job running | running 1.1 open
        6 send a to 0    => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 aggregated     => aggregated, commit | running 1.1 aggregated
        6 commit         => committed 0, 0 scores | running 1.1 committed
        7 score 2.0      => scored 2.0 best 1, open 2 | running 1.1 committed
        8 next a         => opened 2, formed a:0, job running | running 2.1 open
        9 send a to 0    => held a whole, reply held, freeze 0, aggregate | running 2.1 frozen
        9 aggregated     => aggregated, commit | running 2.1 aggregated
        9 commit         => committed 0, 0 scores | running 2.1 committed
        9 score 2.0      => scored 2.0 best 1, job finished | finished 2.1 committed
    """,
    "a pause closes the round: what is whole counts": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer ab cd   => formed ab:0 cd:1, job running | running 1.1 open
        5 send a to 0   => held a, reply held | running 1.1 open
        5 send b to 0   => held b whole, reply held | running 1.1 open
        6 send c to 1   => held c, reply held | running 1.1 open
        7 pause         => lost 1, job running, freeze 0, aggregate | running 1.1 frozen
        7 send d to 1   => reply late | running 1.1 frozen
        8 aggregated    => aggregated, commit | running 1.1 aggregated
        8 restart       => commit | running 1.1 aggregated
        8 commit        => committed 0, job paused | paused 1.1 committed
        9 next ab       => - | paused 1.1 committed
        9 pause         => - | paused 1.1 committed
        10 resume       => job waiting, open 2 | waiting 1.1 committed
        11 next ab      => opened 2, formed ab:0, job running | running 2.1 open
    """,
    "a pause with nothing whole rests at once": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer ab      => formed ab:0, job running | running 1.1 open
        5 send a to 0   => held a, reply held | running 1.1 open
        7 pause         => lost 0, job paused | paused 1.1 open
        8 send b to 0   => reply late | paused 1.1 open
        9 restart       => - | paused 1.1 open
        9 resume        => job waiting, form | waiting 1.1 open
        9 offer ab      => formed ab:1, job running | running 1.2 open
    """,
    "a pause that is only ordered can be called off": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 pause         => job running | running 1.1 frozen
        6 pause         => - | running 1.1 frozen
        6 resume        => job running | running 1.1 frozen
        7 aggregated    => aggregated, commit | running 1.1 aggregated
        7 commit        => committed 0, open 2 | running 1.1 committed
    """,
    "what is damaged on disk is left out": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a b c   => formed a:0 b:1 c:2, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held | running 1.1 open
        5 send b to 1   => held b whole, reply held | running 1.1 open
        5 send c to 2   => held c whole, reply held, freeze 0+1+2, aggregate | running 1.1 frozen
        6 unusable 0+2  => lost 0, lost 2, aggregate | running 1.1 frozen
        6 unusable 0    => - | running 1.1 frozen
        6 restart       => aggregate | running 1.1 frozen
        7 send a to 0   => reply duplicate | running 1.1 frozen
        8 aggregated    => aggregated, commit | running 1.1 aggregated
        8 unusable 1    => - | running 1.1 aggregated
        8 commit        => committed 1, open 2 | running 1.1 committed
    """,
    "nothing is left to aggregate: the round is formed again, and who was late counts in it": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer ab c    => formed ab:0 c:1, job running | running 1.1 open
        5 send a to 0   => held a, reply held | running 1.1 open
        5 send c to 1   => held c whole, reply held | running 1.1 open
        100 tick        => freeze 1 late 0, aggregate | running 1.1 frozen
        101 unusable 1  => lost 1, reopened, job waiting, form | waiting 1.1 open
        101 restart     => form | waiting 1.1 open
        102 aggregated  => - | waiting 1.1 open
        102 offer ab c  => formed ab:2 c:3, job running | running 1.2 open
        103 send b to 0 => reply late | running 1.2 open
        104 send a to 2 => held a, reply held | running 1.2 open
        104 send b to 2 => held b whole, reply held | running 1.2 open
        104 send c to 3 => held c whole, reply held, freeze 2+3, aggregate | running 1.2 frozen
    """,
    "what is damaged again and again pauses the job": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a b     => formed a:0 b:1, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held | running 1.1 open
        5 send b to 1   => held b whole, reply held, freeze 0+1, aggregate | running 1.1 frozen
        6 unusable 0+1  => lost 0, lost 1, reopened, job waiting, form | waiting 1.1 open
        6 offer a       => formed a:2, job running | running 1.2 open
        7 lost a        => lost 2, job waiting, form | waiting 1.2 open
        7 offer a       => formed a:3, job running | running 1.3 open
        8 send a to 3   => held a whole, job running, reply held, freeze 3, aggregate | running 1.3 frozen
        9 unusable 3    => lost 3, reopened, job waiting, form | waiting 1.3 open
        9 offer a       => formed a:4, job running | running 1.4 open
        10 send a to 4  => held a whole, reply held, freeze 4, aggregate | running 1.4 frozen
        11 unusable 4   => lost 4, reopened, job paused | paused 1.4 open
        11 restart      => - | paused 1.4 open
        12 resume       => job waiting, form | waiting 1.4 open
        12 offer a      => formed a:5, job running | running 1.5 open
        13 send a to 5  => held a whole, reply held, freeze 5, aggregate | running 1.5 frozen
        14 aggregated   => aggregated, commit | running 1.5 aggregated
        14 commit       => committed 5, open 2 | running 1.5 committed
    """,
    "a pause of a round that is left without anything": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 pause         => job running | running 1.1 frozen
        7 unusable 0    => lost 0, reopened, job paused | paused 1.1 open
        8 resume        => job waiting, form | waiting 1.1 open
    """,
    "a stop of a round that is left without anything": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 stop          => job running | running 1.1 frozen
        7 unusable 0    => lost 0, reopened, job finished | finished 1.1 open
    """,
    "a stop ends for good, whatever the job was doing": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        5 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        6 pause         => job running | running 1.1 frozen
        6 stop          => job running | running 1.1 frozen
        6 resume        => - | running 1.1 frozen
        7 aggregated    => aggregated, commit | running 1.1 aggregated
        7 commit        => committed 0, job finished | finished 1.1 committed
        8 resume        => - | finished 1.1 committed
        8 rewind 0      => - | finished 1.1 committed
        8 rounds 9      => - | finished 1.1 committed
    """,
    "a stop of a job that waits": """
        0 begin         => opened 1, form | waiting 1.0 open
        1 stop          => job finished | finished 1.0 open
        2 offer ab      => - | finished 1.0 open
    """,
    "a rewind opens the round after the kept one; no generation comes twice": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        1 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        1 aggregated    => aggregated, commit | running 1.1 aggregated
        1 commit        => committed 0, open 2 | running 1.1 committed
        2 next a        => opened 2, formed a:0, job running | running 2.1 open
        3 rewind 0      => - | running 2.1 open
        3 abandon 0     => lost 0, job waiting, form | waiting 2.1 open
        3 offer a       => formed a:1, job running | running 2.2 open
        4 pause         => lost 1, job paused | paused 2.2 open
        4 rewind 1      => - | paused 2.2 open
        5 rewind 0      => rewound 0, opened 1, job waiting, form | waiting 1.2 open
        6 offer a       => formed a:0, job running | running 1.3 open
        7 send a to 0 gen 1 => reply rejected | running 1.3 open
        8 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.3 frozen
        8 aggregated    => aggregated, commit | running 1.3 aggregated
        8 commit        => committed 0, open 2 | running 1.3 committed
        9 next a        => opened 2, formed a:0, job running | running 2.3 open
    """,
    "settings change when pipelines are next formed": """
        0 begin         => opened 1, form | waiting 1.0 open
        0 rounds 3      => settings stored, settings adopted, form | waiting 1.0 open
        0 offer a       => formed a:0, job running | running 1.1 open
        1 rounds 1      => settings stored | running 1.1 open
        1 send a to 0   => held a whole, reply held, freeze 0, aggregate | running 1.1 frozen
        1 aggregated    => aggregated, commit | running 1.1 aggregated
        1 commit        => committed 0, settings adopted, job finished | finished 1.1 committed
    """,
    "settings change for a round that is formed again": """
        0 begin min 2   => opened 1, form | waiting 1.0 open
        0 offer a b     => formed a:0 b:1, job running | running 1.1 open
        1 rounds 5      => settings stored | running 1.1 open
        1 lost a        => lost 0 | running 1.1 open
        2 lost b        => lost 1, settings adopted, job waiting, form | waiting 1.1 open
        3 offer b       => formed b:2, job running | running 1.2 open
    """,
    "a round waits for as many pipelines as the job wants": """
        0 begin min 2   => opened 1, form | waiting 1.0 open
        1 offer ab      => job waiting | waiting 1.0 open
        2 offer ab cd   => formed ab:0 cd:1, job running | running 1.1 open
        3 offer ef      => - | running 1.1 open
    """,
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    lines = [line.strip() for line in SCENARIOS[name].strip().splitlines()]
    played: list[str] = []
    state: RoundsState | None = None
    for line in lines:
        left = line.split(" => ")[0].rstrip()
        now_s, what = left.split(" ", 1)
        state, effects = _play(state, float(now_s), what)
        shown = ", ".join(_show(effect) for effect in effects) or "-"
        where = f"{state.job} {state.round}.{state.generation} {state.phase}"
        played.append(f"{left} => {shown} | {where}")
    assert "\n".join(played) == "\n".join(re.sub(r"\s+=>", " =>", line) for line in lines)


def test_reasons_name_what_is_missing() -> None:
    state, _ = begin(Rules(2, 100.0, 2, 3))
    state, _ = advance(state, Offer(0.0, _plans("a"), "no idle node holds block 1"))
    assert state.reason == "1 of at least 2 pipelines can be formed: no idle node holds block 1"
    state, _ = advance(state, Offer(0.0, _plans("a b"), ""))
    for peer in ("a", "b"):
        state, _ = advance(state, NodeLost(1.0, peer, f"node {peer} fell silent"))
    assert state.reason == "pipelines are being formed again: node b fell silent"


def _play(state: RoundsState | None, now_s: float, what: str) -> tuple[RoundsState, tuple[Effect, ...]]:
    words = what.split()
    if words[0] == "begin":
        deadline_s = None if "auto" in words else 100.0
        quorum = 0.75 if "quorum" in words else 1.0
        rules = Rules(2, deadline_s, int(words[2]) if "min" in words else 1, 3, quorum)
        if "overlap" in words:
            rules = replace(rules, inner_steps=10, overlap_steps=5)
        return begin(replace(rules, eval_every=int("scored" in words), patience=int("patience" in words)))
    assert state is not None
    if words[0] == "restart":
        return recover(state, now_s)
    return advance(state, _event(state, now_s, words))


def _event(state: RoundsState, now_s: float, words: list[str]) -> Event:
    if "without" in words:
        event = _event(state, now_s, words[: words.index("without")])
        return replace(event, absent=frozenset(words[-1]))
    match words:
        case ["offer", *plans]:
            return Offer(now_s, _plans(" ".join(plans)), "no idle node holds block 1")
        case ["next", *plans]:
            return NextRound(now_s, _plans(" ".join(plans)), "no idle node holds block 1")
        case ["send", peer, "to", pipeline_id, *rest]:
            pipeline = state.pipeline(int(pipeline_id))
            generation = pipeline.generation if pipeline else state.generation
            if rest[:1] == ["gen"]:
                generation = int(rest[1])
            number = int(rest[1]) if rest[:1] == ["in"] else state.round
            return Contribution(now_s, number, generation, int(pipeline_id), peer[0], peer.encode())
        case ["lost", peer, *rest]:
            return NodeLost(now_s, peer, f"node {peer} fell silent", _plans(" ".join(rest[1:])))
        case ["abandon", pipeline_id, *rest]:
            return Abandoned(now_s, state.round, int(pipeline_id), "out of memory", _plans(" ".join(rest[1:])))
        case ["tick"]:
            return Tick(now_s)
        case ["aggregated"]:
            return AggregateDone(state.round)
        case ["unusable", ids]:
            return Unusable(state.round, tuple((int(number), "damaged") for number in ids.split("+")))
        case ["commit"]:
            return CommitNow(state.round, now_s)
        case ["resume"]:
            return Resume()
        case ["pause"]:
            return Pause("paused by its owner")
        case ["stop"]:
            return Stop("stopped by its owner")
        case ["rewind", number]:
            return Rewind(int(number), state.generation)
        case ["rounds", number]:
            return Change(Settings(replace(state.rules, rounds=int(number), min_pipelines=1), f"{number} rounds"))
        case ["score", loss]:
            return Scored(state.round, float(loss), 7)
    raise AssertionError(f"no such event: {words}")


def _plans(text: str) -> tuple[PipelinePlan, ...]:
    return tuple(
        PipelinePlan(tuple(Member(peer, Span(at, at + 1)) for at, peer in enumerate(word)))
        for word in text.split()
        if word != "-"
    )


def _show(effect: Effect) -> str:
    match effect:
        case RoundOpened(number):
            return f"opened {number}"
        case PipelinesFormed(_, _, pipelines, continued, ahead):
            before = dict(continued)
            words = [
                "".join(m.peer for m in p.members)
                + f":{p.pipeline_id}"
                + (f" from {before[p.pipeline_id]}" if p.pipeline_id in before else "")
                for p in pipelines
            ]
            return f"formed {' '.join(words)}{' again' if pipelines[0].repair else ''}{' ahead' if ahead else ''}"
        case ContributionHeld(_, _, held, whole):
            return f"held {held.peer}{' whole' if whole else ''}"
        case PipelineLost(_, pipeline_id, _):
            return f"lost {pipeline_id}"
        case RoundFrozen(_, accepted, late):
            return f"freeze {_ids(accepted)}{f' late {_ids(late)}' if late else ''}"
        case RoundReopened():
            return "reopened"
        case RoundAggregated():
            return "aggregated"
        case RoundCommitted(_, accepted):
            return f"committed {_ids(accepted)}"
        case JobChanged(state, _, _, _):
            return f"job {state}"
        case ScoringBegun(_, pipeline_id):
            return f"{pipeline_id} scores"
        case RoundScored(_, None):
            return "not scored"
        case RoundScored(_, loss, _, best):
            return f"scored {loss} best {best.round if best else None}"
        case WrapUp():
            return "wrap up"
        case SettingsStored():
            return "settings stored"
        case SettingsAdopted():
            return "settings adopted"
        case Rewound(number, _, _):
            return f"rewound {number}"
        case Reply(answer, _):
            return f"reply {answer}"
        case FormPipelines():
            return "form"
        case Aggregate():
            return "aggregate"
        case Commit():
            return "commit"
        case OpenNext(number):
            return f"open {number}"


def _ids(pipeline_ids: tuple[int, ...]) -> str:
    return "+".join(str(pipeline_id) for pipeline_id in pipeline_ids)
