//! The types that a weight's elements can have in a file.

use std::fmt;

/// How the elements of a weight are stored, in GGUF or in safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an `F32`.
    Bf16,
    /// 32 elements of 4 bits around zero, one scale.
    Q4_0,
    /// 32 elements of 4 bits, one scale and one minimum.
    Q4_1,
    /// 32 elements of 5 bits around zero, one scale.
    Q5_0,
    /// 32 elements of 5 bits, one scale and one minimum.
    Q5_1,
    /// 32 elements of 8 bits around zero, one scale.
    Q8_0,
    /// 256 elements of 2 bits; a scale and a minimum of 4 bits for each 16.
    Q2K,
    /// 256 elements of 3 bits around zero; a scale of 6 bits for each 16.
    Q3K,
    /// 256 elements of 4 bits; a scale and a minimum of 6 bits for each 32.
    Q4K,
    /// 256 elements of 5 bits; a scale and a minimum of 6 bits for each 32.
    Q5K,
    /// 256 elements of 6 bits around zero; a scale of 8 bits for each 16.
    Q6K,
    /// 32 elements of 4 bits that stand for unevenly spaced values, one scale.
    Iq4Nl,
    /// 256 elements as in `Iq4Nl`; a scale of 6 bits for each 32.
    Iq4Xs,
    /// 32 elements in FP4 (OCP Microscaling), the scale a power of two.
    Mxfp4,
}

/// All other types that ggml has or had, by their number: what such a tensor is refused by.
const OTHERS: [(u32, &str); 26] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (37, "IQ4_NL_4_8"),
    (38, "IQ4_NL_8_8"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl ElementType {
    /// Every type, in the order of ggml's numbers.
    pub const ALL: [ElementType; 16] = [
        ElementType::F32,
        ElementType::F16,
        ElementType::Q4_0,
        ElementType::Q4_1,
        ElementType::Q5_0,
        ElementType::Q5_1,
        ElementType::Q8_0,
        ElementType::Q2K,
        ElementType::Q3K,
        ElementType::Q4K,
        ElementType::Q5K,
        ElementType::Q6K,
        ElementType::Iq4Nl,
        ElementType::Iq4Xs,
        ElementType::Bf16,
        ElementType::Mxfp4,
    ];

    /// Name, number in ggml, elements of a block, bytes of a block.
    const fn facts(self) -> (&'static str, u32, usize, usize) {
        match self {
            ElementType::F32 => ("F32", 0, 1, 4),
            ElementType::F16 => ("F16", 1, 1, 2),
            ElementType::Q4_0 => ("Q4_0", 2, 32, 18),
            ElementType::Q4_1 => ("Q4_1", 3, 32, 20),
            ElementType::Q5_0 => ("Q5_0", 6, 32, 22),
            ElementType::Q5_1 => ("Q5_1", 7, 32, 24),
            ElementType::Q8_0 => ("Q8_0", 8, 32, 34),
            ElementType::Q2K => ("Q2_K", 10, 256, 84),
            ElementType::Q3K => ("Q3_K", 11, 256, 110),
            ElementType::Q4K => ("Q4_K", 12, 256, 144),
            ElementType::Q5K => ("Q5_K", 13, 256, 176),
            ElementType::Q6K => ("Q6_K", 14, 256, 210),
            ElementType::Iq4Nl => ("IQ4_NL", 20, 32, 18),
            ElementType::Iq4Xs => ("IQ4_XS", 23, 256, 136),
            ElementType::Bf16 => ("BF16", 30, 1, 2),
            ElementType::Mxfp4 => ("MXFP4", 39, 32, 17),
        }
    }

    /// Its name, as GGUF has it.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The type of that name, in upper or lower case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.name().eq_ignore_ascii_case(name))
    }

    /// Elements that are coded together: the rows of a weight are whole blocks.
    pub const fn block_len(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        self.facts().3
    }

    /// Bytes of `cols` elements; `None` where they are not whole blocks, or more than memory can hold.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Its number in ggml, and so in GGUF.
    pub const fn ggml_id(self) -> u32 {
        self.facts().1
    }

    /// The type of that number; `None` for those that are not decoded here, see [`ggml_type_name`].
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.ggml_id() == id)
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name of any type that ggml has or had, decoded here or not.
pub fn ggml_type_name(id: u32) -> Option<&'static str> {
    let other = || OTHERS.iter().find(|(other, _)| *other == id).map(|(_, name)| *name);
    ElementType::from_ggml_id(id).map(ElementType::name).or_else(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found_again_and_stand_for_one_type_each() {
        for ty in ElementType::ALL {
            assert_eq!(ElementType::from_name(ty.name()), Some(ty));
            assert_eq!(ElementType::from_name(&ty.name().to_lowercase()), Some(ty));
            assert_eq!(ElementType::from_ggml_id(ty.ggml_id()), Some(ty));
            assert_eq!(ggml_type_name(ty.ggml_id()), Some(ty.name()));
            assert!(OTHERS.iter().all(|(id, name)| *id != ty.ggml_id() && *name != ty.name()));
        }
        // ggml numbers its types without gaps.
        assert!((0..=41).all(|id| ggml_type_name(id).is_some()));
        assert_eq!(ggml_type_name(42), None);
        assert_eq!(ggml_type_name(16), Some("IQ2_XXS"));
        assert_eq!(ElementType::from_ggml_id(16), None);
        assert_eq!(ElementType::from_name("Q4"), None);
    }

    #[test]
    fn rows_are_whole_blocks() {
        assert_eq!(ElementType::Q4K.row_bytes(512), Some(288));
        assert_eq!(ElementType::Q4K.row_bytes(128), None);
        assert_eq!(ElementType::Bf16.row_bytes(3), Some(6));
        assert_eq!(ElementType::F32.row_bytes(usize::MAX), None);
        assert_eq!(ElementType::Mxfp4.row_bytes(0), Some(0));
    }
}
