use std::fmt;

/// An instruction set that kernels are written for, from the one that every card has to those of few.
///
/// The kernels of a set other than the first lie in a folder of their own: kernels/sm90 has those of [`Isa::Sm90a`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Ampere's cp.async and mma, which every later card has too: the portable kernels.
    Sm80,
    /// Hopper's wgmma, TMA, clusters and setmaxnreg. "a": of this architecture alone, no later card has them all.
    Sm90a,
}

impl Isa {
    pub const ALL: [Isa; 2] = [Isa::Sm80, Isa::Sm90a];

    /// Whether a card of this compute capability, major and minor, has the instructions.
    pub fn runs_on(self, capability: (i32, i32)) -> bool {
        match self {
            Isa::Sm80 => capability >= (8, 0),
            Isa::Sm90a => capability == (9, 0),
        }
    }

    /// As `MEGAFUSE_CUDA_ARCHS` names the architecture.
    pub(super) fn arch(self) -> &'static str {
        match self {
            Isa::Sm80 => "80",
            Isa::Sm90a => "90a",
        }
    }
}

/// `sm_80`, `sm_90a`
impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "sm_{}", self.arch())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_set_of_one_architecture_runs_there_alone() {
        let on = |capability| Isa::ALL.map(|isa| isa.runs_on(capability));
        assert_eq!(on((7, 5)), [false, false]);
        for portable in [(8, 0), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0)] {
            assert_eq!(on(portable), [true, false], "{portable:?}");
        }
        assert_eq!(on((9, 0)), [true, true]);
    }
}
