//! The calendar behind the real-time clock: Gregorian, in UTC, without leap seconds.

const DAY_S: i64 = 86_400;
/// Days from 0000-03-01 to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
/// Days in 400 years.
const ERA_DAYS: i64 = 146_097;

/// The last time a clock is started with: the end of the year 9999.
pub const UNIX_S_MAX: u64 = 253_402_300_799;

/// The fields of the clock. While a guest sets them they may hold anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calendar {
    /// Anno Domini.
    pub year: u16,
    /// 1..=12.
    pub month: u8,
    /// 1..=31.
    pub day: u8,
    /// 0..=23.
    pub hour: u8,
    /// 0..=59.
    pub minute: u8,
    /// 0..=59.
    pub second: u8,
}

impl Calendar {
    /// The fields at `unix_s` seconds since 1970.
    #[must_use]
    pub fn from_unix(unix_s: i64) -> Self {
        let second = unix_s.rem_euclid(DAY_S);
        // Years begin in March here, so that a leap day is a year's last.
        let day = unix_s.div_euclid(DAY_S) + EPOCH_DAYS;
        let day_of_era = day.rem_euclid(ERA_DAYS);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let year = year_of_era + day.div_euclid(ERA_DAYS) * 400 + i64::from(month >= 10);
        Self {
            year: year.clamp(0, 25_599) as u16,
            month: (if month < 10 { month + 3 } else { month - 9 }) as u8,
            day: (day_of_year - (153 * month + 2) / 5 + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }

    /// Seconds since 1970; fields out of range are brought into it.
    #[must_use]
    pub fn unix_s(self) -> i64 {
        let second = i64::from(self.hour.min(23)) * 3600
            + i64::from(self.minute.min(59)) * 60
            + i64::from(self.second.min(59));
        self.days() * DAY_S + second
    }

    /// The day of the week, 1 (Sunday) ..= 7.
    #[must_use]
    pub fn weekday(self) -> u8 {
        (self.days() + 4).rem_euclid(7) as u8 + 1
    }

    /// Days since 1970-01-01.
    fn days(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.year) - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(self.day.clamp(1, 31)) - 1;
        era * ERA_DAYS + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH_DAYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_days() {
        let time = Calendar::from_unix(951_782_400); // a leap day of a leap century
        assert_eq!((time.year, time.month, time.day, time.hour), (2000, 2, 29, 0));
        assert_eq!(time.weekday(), 3);
        assert_eq!(Calendar::from_unix(0).weekday(), 5);
    }

    proptest! {
        #[test]
        fn there_and_back(unix_s in 0..=UNIX_S_MAX as i64) {
            prop_assert_eq!(Calendar::from_unix(unix_s).unix_s(), unix_s);
        }
    }
}
